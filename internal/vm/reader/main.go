// Command reader reads files as ordinary programs do: into its heap, printing
// nothing of them, leaving its memory to the kernel when it ends.
package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

func main() {
	total := 0
	err := filepath.WalkDir(os.Args[1], func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		total += len(content)
		return err
	})
	fmt.Println(total, "bytes")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
