package kmstest

import (
	"sync"
	"time"
)

// quota counts requests per second of the server's clock, region and group
// of actions, as the service does.
type quota struct {
	mu     sync.Mutex
	limit  int // 0: none
	second int64
	used   map[string]int
}

func (q *quota) setLimit(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.limit = n
}

func (q *quota) take(action, region string, now time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.limit == 0 {
		return nil
	}
	if q.second != now.Unix() || q.used == nil {
		q.second, q.used = now.Unix(), map[string]int{}
	}
	group := region + " " + quotaGroup(action)
	q.used[group]++
	if q.used[group] > q.limit {
		return refuse(codeRequestLimit, "Your current request times equals to `%d` in a second, which exceeds the frequency limit `%d` for a second. Please reduce the frequency of calls.", q.used[group], q.limit)
	}
	return nil
}

func quotaGroup(action string) string {
	switch action {
	case "Encrypt", "Decrypt", "ReEncrypt":
		return "symmetric"
	}
	return action
}
