package secmem_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"kmsfs/internal/secmem"
)

const swapHeading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"

func TestExposure(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  secmem.Exposure
		warn  []string // one word of each warning
	}{
		{name: "nothing at all", files: nil},
		{
			name: "no swap",
			files: map[string]string{
				"proc/swaps": swapHeading, "sys/power/state": "freeze mem disk\n", "proc/sys/kernel/core_pattern": "|/bin/false\n",
			},
			want: secmem.Exposure{Hibernation: true, CorePattern: "|/bin/false"},
		},
		{
			name: "stock laptop",
			files: map[string]string{
				"proc/swaps":                   swapHeading + "/dev/sda5  partition  999 0 -2\n/swap\\040file  file  999 0 -3\n",
				"sys/power/state":              "freeze mem disk\n",
				"proc/sys/kernel/core_pattern": "|/lib/systemd/systemd-coredump %P %u\n",
			},
			want: secmem.Exposure{
				Swap:        []secmem.SwapArea{{Path: "/dev/sda5"}, {Path: "/swap file"}},
				Hibernation: true, CorePattern: "|/lib/systemd/systemd-coredump %P %u",
			},
			warn: []string{"/dev/sda5", "/swap file", "hibernation", "systemd-coredump"},
		},
		{
			name: "encrypted or in RAM",
			files: map[string]string{
				"proc/swaps":                   swapHeading + "/dev/dm-1 partition 9 0 -2\n/dev/zram0 partition 9 0 5\n/dev/zram1 partition 9 0 5\n/dev/dm-3 partition 9 0 -4\n",
				"sys/block/dm-0/dm/uuid":       "CRYPT-LUKS2-0123-luks\n",
				"sys/block/dm-1/dm/uuid":       "LVM-0123\n",
				"sys/block/dm-1/slaves/dm-0/x": "",
				"sys/block/dm-3/dm/uuid":       "LVM-4567\n",
				"sys/block/dm-3/slaves/sda3/x": "",
				"sys/block/zram0/backing_dev":  "none\n",
				"sys/block/zram1/backing_dev":  "/dev/sda9\n",
				"sys/power/state":              "freeze mem\n",
				"proc/sys/kernel/core_pattern": "core\n",
			},
			want: secmem.Exposure{
				Swap: []secmem.SwapArea{
					{Path: "/dev/dm-1", Encrypted: true}, {Path: "/dev/zram0", InRAM: true}, {Path: "/dev/zram1"}, {Path: "/dev/dm-3"},
				},
				CorePattern: "core",
			},
			warn: []string{"/dev/zram1", "/dev/dm-3", `"core"`},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range c.files {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := secmem.ReadExposure(root)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v\nwant %+v", got, c.want)
			}
			warnings := got.Warnings()
			if len(warnings) != len(c.warn) {
				t.Fatalf("warnings %q, want %d", warnings, len(c.warn))
			}
			for i, w := range c.warn {
				if !strings.Contains(warnings[i], w) {
					t.Errorf("warning %q does not name %s", warnings[i], w)
				}
			}
		})
	}
}

func TestExposureOfThisMachine(t *testing.T) {
	if _, err := secmem.ReadExposure("/"); err != nil {
		t.Error(err)
	}
}
