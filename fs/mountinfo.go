package fs

import "kmsfs/internal/mountinfo"

// mountType is how the kernel and mountinfo call our mounts.
const mountType = mountinfo.KMSFS

// topMount returns the mount at point that no other at point covers.
func topMount(all []mountinfo.Mount, point string) (mountinfo.Mount, bool) {
	covered := make(map[int]bool)
	for _, m := range all {
		if m.Point == point {
			covered[m.Under] = true
		}
	}
	for _, m := range all {
		if m.Point == point && !covered[m.ID] {
			return m, true
		}
	}
	return mountinfo.Mount{}, false
}
