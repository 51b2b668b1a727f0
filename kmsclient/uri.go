package kmsclient

import (
	"fmt"
	"regexp"
	"strings"
)

// Scheme begins the URI of a key, and is the type of its stanzas.
const Scheme = "tencentkms"

// A keyName is one CMK: KMS keys are regional.
type keyName struct {
	region, id string
}

func (k keyName) String() string { return Scheme + ":" + k.region + "/" + k.id }

// ParseURI takes tencentkms:<region>/<KeyId> apart. Its errors say what to write
// instead.
func ParseURI(uri string) (region, keyID string, err error) {
	k, err := parseKey(uri)
	return k.region, k.id, err
}

func parseKey(uri string) (keyName, error) {
	rest, ok := strings.CutPrefix(uri, Scheme+":")
	if !ok {
		return keyName{}, badURI(uri, "it does not begin with "+Scheme+":")
	}
	if strings.HasPrefix(rest, "//") {
		return keyName{}, badURI(uri, "there are no slashes before the region")
	}
	region, id, ok := strings.Cut(rest, "/")
	switch {
	case !ok && regionForm.MatchString(rest):
		return keyName{}, badURI(uri, "the KeyId is missing")
	case !ok:
		return keyName{}, badURI(uri, "the region is missing")
	case !regionForm.MatchString(region):
		return keyName{}, badURI(uri, fmt.Sprintf("%q is no region; regions look like ap-guangzhou", region))
	case id == "":
		return keyName{}, badURI(uri, "the KeyId is missing")
	case strings.HasPrefix(id, "alias/"):
		return keyName{}, badURI(uri, "the KMS takes no aliases here; the KeyId stands beside the alias in its console")
	case !keyIDForm.MatchString(id):
		return keyName{}, badURI(uri, fmt.Sprintf("%q is no KeyId", id))
	}
	if uuidForm.MatchString(id) {
		id = strings.ToLower(id) // as the KMS spells it
	}
	return keyName{region: region, id: id}, nil
}

func badURI(uri, problem string) error {
	return fmt.Errorf("key %q: %s (want %s:<region>/<KeyId>, for example "+
		"%s:ap-guangzhou/23e80852-1e38-11e9-b129-5cb9019b4b01)", uri, problem, Scheme, Scheme)
}

// KeyIds are UUIDs in the documentation, but nothing promises it: be generous.
var (
	regionForm = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)+$`)
	keyIDForm  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$`)
	uuidForm   = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)
)
