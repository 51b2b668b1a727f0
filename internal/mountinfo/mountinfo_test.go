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
