package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// manualCommand prints kmsfs(8) in the Markdown that go-md2man takes. It is for
// whoever builds packages; what it says comes from the verbs themselves.
func (u *ui) manualCommand() *cli.Command {
	return &cli.Command{
		Name:   "manual",
		Usage:  "print the manual page as Markdown",
		Hidden: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "date", Usage: "of the page"},
		},
		Action: func(c *cli.Context) error {
			return writeManual(u.stdout, newApp(u), c.String("date"))
		},
	}
}

const manualOverview = `
# DESCRIPTION

**kmsfs** shows encrypted configuration files as ordinary ones. Each file is decrypted when it is opened, under a master key that never leaves
Tencent Cloud KMS or a PKCS#11 HSM; its plaintext is in locked memory only. Unmount it, and access is gone, also through descriptors and
mappings that were open before.

A tree is a directory of sealed files with a name, described by _/etc/kmsfs/NAME.toml_ (see **kmsfs.toml**(5)). Without a configuration
the verbs take a key with **--key**. Flags stand before arguments.

Keys are named **tencentkms:REGION/KEYID**, **pkcs11:...** (RFC 7512) or **file:PATH**.
`

const manualPlaces = `
# MOUNT(8) AND FSTAB(5)

**mount.fuse.kmsfs** is called by **mount**(8); the source is the name of a tree or the path of a configuration:

    mount -t fuse.kmsfs shop /etc/shop
    shop  /etc/shop  fuse.kmsfs  noauto,nofail,_netdev  0  0

The unit **kmsfs@NAME.service** is the better way to mount at boot: it is restarted after a crash, and applications can be bound to it.

# SIGNALS

**SIGTERM**, **SIGINT**
: Revoke and end. The second one ends the waiting of **umount --wait**.

**SIGHUP**
: Read the configuration again, as **kmsfs reload** does.

# ENVIRONMENT

**TENCENTCLOUD_SECRET_ID**, **TENCENTCLOUD_SECRET_KEY**, **TENCENTCLOUD_TOKEN**, **TENCENTCLOUD_CREDENTIALS_FILE**
: Credentials for the KMS, where neither systemd nor the instance's role provides them.

**CREDENTIALS_DIRECTORY**
: Set by systemd. Holds _tencentcloud-secret-id_, _tencentcloud-secret-key_, _tencentcloud-token_ and _hsm-pin_, if the unit loads them.

# FILES

_/etc/kmsfs/NAME.toml_
: The configuration of tree NAME, which root alone may write.

_/run/kmsfs/_
: Sockets and locks of running mounts, and which PINs were refused.

_/var/log/kmsfs/_
: A place for audit logs.
`

// writeManual writes the whole page.
func writeManual(w io.Writer, app *cli.App, date string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%% kmsfs 8 %q %q %q\n", date, "kmsfs "+version, "System administration")
	fmt.Fprintf(&b, "\n# NAME\n\nkmsfs - %s\n\n# SYNOPSIS\n\n", app.Usage)
	b.WriteString("**kmsfs** _VERB_ [_FLAGS_] [_ARGUMENTS_]\n\n**mount -t fuse.kmsfs** _NAME_ _MOUNTPOINT_\n")
	b.WriteString(manualOverview)
	b.WriteString("\n# VERBS\n")
	for _, c := range app.Commands {
		manualVerb(&b, c, "")
	}
	b.WriteString("\n# EXIT STATUS\n")
	for _, e := range exitCodes() {
		fmt.Fprintf(&b, "\n**%d**\n: %s (%s)\n", e.code, capital(e.meaning), e.name)
	}
	b.WriteString(manualPlaces)
	b.WriteString("\n# SEE ALSO\n\n**kmsfs.toml**(5), **mount**(8), **systemd.exec**(5), **age**(1)\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func manualVerb(b *strings.Builder, c *cli.Command, parent string) {
	if c.Hidden {
		return
	}
	name := strings.TrimSpace(parent + " " + c.Name)
	if len(c.Subcommands) > 0 {
		for _, sub := range c.Subcommands {
			manualVerb(b, sub, name)
		}
		return
	}
	fmt.Fprintf(b, "\n## %s %s\n\n%s.\n", name, markdown(c.ArgsUsage), capital(markdown(c.Usage)))
	if c.Description != "" {
		fmt.Fprintf(b, "%s\n", markdown(c.Description))
	}
	for _, f := range c.VisibleFlags() {
		flag, ok := f.(cli.DocGenerationFlag)
		if !ok || f.Names()[0] == "help" {
			continue
		}
		value, text := unquoted(flag.GetUsage())
		if !flag.TakesValue() {
			value = ""
		}
		var names []string
		for _, n := range f.Names() {
			names = append(names, strings.TrimRight("**"+dashed(n)+"** "+value, " "))
		}
		fmt.Fprintf(b, "\n%s\n: %s%s\n", strings.Join(names, ", "), sentence(flag.GetUsage(), text), defaultOf(flag))
	}
}

// unquoted takes the name of a flag's value out of its usage, where it stands in
// backquotes.
func unquoted(usage string) (value, text string) {
	before, rest, ok := strings.Cut(usage, "`")
	name, after, closed := strings.Cut(rest, "`")
	if !ok || !closed {
		return "_VALUE_", usage
	}
	return "_" + name + "_", before + name + after
}

func defaultOf(f cli.DocGenerationFlag) string {
	text := strings.Trim(f.GetDefaultText(), `"`)
	if !f.TakesValue() || text == "" || text == "0s" || text == "0" || strings.Contains(f.GetUsage(), "default:") {
		return ""
	}
	return " (default: " + text + ")"
}

// markdown keeps what is special to Markdown from being taken so.
func markdown(s string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "_", `\_`, "<", `\<`, "|", `\|`, "[", `\[`, "]", `\]`).Replace(s)
}

// sentence begins with a capital letter, unless a value to be typed comes first.
func sentence(usage, text string) string {
	if strings.HasPrefix(usage, "`") {
		return markdown(text)
	}
	return capital(markdown(text))
}

func capital(s string) string {
	if s == "" {
		return ""
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
