package mountinfo

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	all, err := Parse(strings.NewReader(
		"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n" +
			"42 22 0:39 / /mnt/a\\040b ro - fuse.kmsfs /etc/a\\134b ro,allow_other\n" +
			"short line\n"))
	want := []Mount{
		{ID: 22, Under: 1, Dev: unix.Mkdev(8, 1), Root: "/", Point: "/", Type: "ext4", Source: "/dev/sda1"},
		{ID: 42, Under: 22, Dev: unix.Mkdev(0, 39), Root: "/", Point: "/mnt/a b", Type: KMSFS, Source: `/etc/a\b`},
	}
	if err != nil || !slices.Equal(all, want) {
		t.Errorf("got %+v, %v", all, err)
	}
}

// TestTop: a mount that was put beneath another is listed after it.
func TestTop(t *testing.T) {
	all := []Mount{
		{ID: 1, Under: 1, Point: "/"},
		{ID: 20, Under: 1, Point: "/mnt"},
		{ID: 21, Under: 22, Point: "/mnt"},
		{ID: 22, Under: 20, Point: "/mnt"},
		{ID: 23, Under: 21, Point: "/mnt/below"},
	}
	for point, want := range map[string]int{"/": 1, "/mnt": 21, "/mnt/below": 23, "/none": 0} {
		if m, ok := Top(all, point); m.ID != want || ok != (want != 0) {
			t.Errorf("%s: %d, %v; want %d", point, m.ID, ok, want)
		}
	}
}
