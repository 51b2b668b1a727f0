package sealed_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"kmsfs/internal/sealed"
)

func BenchmarkParse(b *testing.B) {
	bench := newBench(b)
	for _, armored := range []bool{false, true} {
		file := bench.seal(sealed.Sealer{Binding: place, Armor: armored}, random(2048))
		b.Run(fmt.Sprintf("armor=%v", armored), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := sealed.Parse(bytes.NewReader(file), int64(len(file))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOpen includes the unwrapping by a key file, which is all in memory.
func BenchmarkOpen(b *testing.B) {
	bench := newBench(b)
	for _, size := range []int{2048, 1 << 20} {
		for _, armored := range []bool{false, true} {
			file := bench.seal(sealed.Sealer{Binding: place, Armor: armored}, random(size))
			b.Run(fmt.Sprintf("size=%d/armor=%v", size, armored), func(b *testing.B) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				o := bench.opener()
				for b.Loop() {
					buf, err := o.Open(context.Background(), bytes.NewReader(file), int64(len(file)), place, nil)
					if err != nil {
						b.Fatal(err)
					}
					buf.Wipe()
				}
			})
		}
	}
}
