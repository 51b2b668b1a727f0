package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
)

func (u *ui) inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show what a sealed file says of itself, without a key",
		ArgsUsage: "FILE…",
		Description: "Shows format, sizes, keys and the place the file is bound to. Nothing of it is proved: kmsfs verify does that,\n" +
			"with the key.",
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON, one object a file"}},
		Action: u.inspect,
	}
}

// An inspection is what can be known without a key.
type inspection struct {
	File      string          `json:"file"`
	Format    string          `json:"format"` // "age" or "blob"
	Armored   bool            `json:"armored"`
	Sealed    int64           `json:"sealed_bytes"`
	Plain     int64           `json:"plaintext_bytes"`
	Exact     bool            `json:"plaintext_bytes_exact"`
	Bound     keyring.Context `json:"bound_to"` // null: to nothing
	Recipient []recipient     `json:"recipients"`
}

// A recipient is one way to open the file.
type recipient struct {
	Type string   `json:"type"`
	Args []string `json:"args"`
	Kind string   `json:"kind"` // "key service", "recovery" or "unknown"
}

func (u *ui) inspect(c *cli.Context) error {
	if c.NArg() == 0 {
		return usage(c, errors.New("name a sealed file"), false)
	}
	var s spots
	defer s.Close()
	var failed []error
	for _, name := range c.Args().Slice() {
		i, err := inspectFile(&s, name)
		switch {
		case err != nil:
			failed = append(failed, fmt.Errorf("inspect %s: %w", name, err))
		case c.Bool("json"):
			if err := json.NewEncoder(u.stdout).Encode(i); err != nil {
				return err
			}
		default:
			i.print(u.stdout)
		}
	}
	return errors.Join(failed...)
}

func inspectFile(s *spots, name string) (*inspection, error) {
	at, err := s.find(name)
	if err != nil {
		return nil, err
	}
	f, info, err := at.openRegular(os.O_RDONLY)
	if errors.Is(err, errDirectory) {
		err = withHint(err, "name one file; kmsfs verify -r looks at all files of a tree")
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := sealed.Parse(f, info.Size())
	if err != nil {
		return nil, err
	}
	i := &inspection{
		File: name, Format: "age", Armored: p.Armored, Sealed: info.Size(), Plain: p.Size, Exact: true,
		Bound: p.Binding, Recipient: []recipient{},
	}
	if p.Kind == sealed.Blob {
		i.Format, i.Exact = "blob", false
	}
	for _, st := range p.Stanzas {
		if kind := kindOf(st.Type); kind != "" {
			i.Recipient = append(i.Recipient, recipient{st.Type, st.Args, kind})
		}
	}
	return i, nil
}

// kindOf says what a stanza of that type is for; "" is the binding.
func kindOf(stanza string) string {
	switch stanza {
	case "tencentkms", "pkcs11", "file":
		return "key service"
	case "kmsfs":
		return ""
	case "X25519", "scrypt", "ssh-ed25519", "ssh-rsa", "piv-p256", "mlkem768x25519", "p256tag", "mlkem768p256tag":
		return "recovery"
	}
	return "unknown"
}

func (i *inspection) print(w io.Writer) {
	fmt.Fprintln(w, i.File)
	format := "age v1, binary"
	switch {
	case i.Format == "blob":
		format = "KMS CiphertextBlob"
	case i.Armored:
		format = "age v1, armored"
	}
	size := count(int(i.Plain), "byte")
	if !i.Exact {
		size = "at most " + size
	}
	fmt.Fprintf(w, "  format     %s\n", format)
	fmt.Fprintf(w, "  plaintext  %s (sealed %d)\n", size, i.Sealed)
	switch {
	case i.Format == "blob":
	case i.Bound == nil:
		fmt.Fprintf(w, "  bound to   nothing\n")
	default:
		fmt.Fprintf(w, "  bound to   %s in tree %s\n", i.Bound["path"], i.Bound["tree"])
	}
	for n, r := range i.Recipient {
		label := ""
		if n == 0 {
			label = "opens by"
		}
		fmt.Fprintf(w, "  %-9s  %s (%s)\n", label, strings.Join(append([]string{r.Type}, r.Args...), " "), r.Kind)
	}
}
