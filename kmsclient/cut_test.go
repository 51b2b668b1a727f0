package kmsclient

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
)

func TestCutPlaintext(t *testing.T) {
	for doc, want := range map[string]string{ // "" for an error, "-" for no plaintext
		`{"Response":{"KeyId":"k","Plaintext":"c2VjcmV0","RequestId":"r"}}`:                                          "secret",
		`{"Response":{"Plaintext":"c2VjcmV0"}}`:                                                                      "secret",
		" {\t\"Response\" :\r\n{ \"Plaintext\" : \"c2VjcmV0\" , \"n\" : [ 1 , { \"a\" : null } , true , -1e9 ] } } ": "secret",
		`{"Other":{"a":[[],{},"\"}"]},"Response":{"x":{"y":"z"},"Plaintext":"c2VjcmV0"}}`:                            "secret",
		`{"Response":{"Plaintext":"Pz8\/Pz8\u003d"}}`:                                                                "?????",
		`{"Response":{"Plaintext":"++\u002b+"}}`:                                                                     "\xfb\xef\xbe",
		`{"Response":{"plainText":"c2VjcmV0"}}`:                                                                      "secret",
		`{"Response":{"RequestId":"r"}}`:                                                                             "-",
		`{"Response":{"Plaintext":null}}`:                                                                            "-",
		`{}`:                                                                                                         "-",
		`{"Response":{"Plaintext":"c2VjcmV0"}`:                                                                       "",
		`{"Response":{"Plaintext":"c2VjcmV0`:                                                                         "",
		`{"Response":{"Plaintext":"c2VjcmV0\`:                                                                        "",
		`{"Response":{"Plaintext":"c2VjcmV"}}`:                                                                       "",
		`{"Response":{"Plaintext":"c2VjcmV0\n"}}`:                                                                    "",
		`{"Response":{"Plaintext":"c2VjcmV0\u00"}}`:                                                                  "",
		`{"Response":{"Plaintext":"c2VjcmV0\u0100"}}`:                                                                "",
		`{"Response":{"Plaintext":["c2VjcmV0"]}}`:                                                                    "",
		`{"Response":{"Plaintext":"c2VjcmV0","Plaintext":"c2VjcmV0"}}`:                                               "",
		`{"Response":{"x":{"Plaintext":"c2VjcmV0"}}}`:                                                                "",
		`{"Response":[{"Plaintext":"c2VjcmV0"}]}`:                                                                    "",
		`{"a":{"Response":{"Plaintext":"c2VjcmV0"}}}`:                                                                "",
		`{"Plaintext":"c2VjcmV0"}`:                                                                                   "",
		`{"R\u0065sponse":{"\u672a":"Plaintext","Plainte\u0078t":"c2VjcmV0"}}`:                                       "secret",
		`{"Response":{"x":{"Plainte\u0078t":"c2VjcmV0"}}}`:                                                           "",
		`{"Response":{"Plaintext":"c2VjcmV0","Plainte\u0078t":"c2VjcmV0"}}`:                                          "",
		`{"Response":{"Plaintext\":"c2VjcmV0"}}`:                                                                     "",
		`{"Response":{,"Plaintext":"c2VjcmV0"}}`:                                                                     "",
		`{"Response":{"Plaintext" "c2VjcmV0"}}`:                                                                      "",
		`{"Response":{"Plaintext":"c2VjcmV0"}} x`:                                                                    "",
		`"c2VjcmV0"`: "", `[]`: "", ``: "", `{`: "", `{"a":}`: "", `{"a":1,}`: "",
	} {
		plain, rest, err := cutPlaintext([]byte(doc))
		switch {
		case want == "" && err == nil:
			t.Errorf("%s: no error, plaintext %q, rest %s", doc, plain, rest)
		case want == "-" && (err != nil || plain != nil || string(rest) != doc):
			t.Errorf("%s: got %q, %s, %v", doc, plain, rest, err)
		case want != "" && want != "-" && (err != nil || string(plain) != want || !json.Valid(rest) || strings.Contains(string(rest), "c2Vj")):
			t.Errorf("%s: got %q, %s, %v", doc, plain, rest, err)
		}
	}
}

// TestCutLeavesOnlyPlaintext: of the document nothing remains but the plaintext.
func TestCutLeavesOnlyPlaintext(t *testing.T) {
	secret := bytes.Repeat([]byte("all of it "), 50)
	doc := []byte(`{"Response":{"KeyId":"k","Plaintext":"` + base64.StdEncoding.EncodeToString(secret) + `"}}`)
	plain, _, err := cutPlaintext(doc)
	if err != nil || !bytes.Equal(plain, secret) {
		t.Fatalf("got %q, %v", plain, err)
	}
	clear(plain)
	if !bytes.Equal(doc, make([]byte, len(doc))) {
		t.Errorf("left over: %q", doc)
	}
}

// FuzzCutPlaintext compares with encoding/json: what is cut out is what it would have
// found, and it finds nothing in the rest.
func FuzzCutPlaintext(f *testing.F) {
	for _, s := range []string{
		`{"Response":{"KeyId":"k","Plaintext":"c2VjcmV0","RequestId":"r"}}`,
		`{"Response":{"plaintext":"\u0063\/VjcmV0"},"x":[1,"\\",{}]}`,
		`{"Response":{"Plaintext":null}}`,
		`{"Respons\u0065":{"\u672a\"":"","Pl\u0061intext":"c2VjcmV0"}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		type response struct {
			Response struct{ Plaintext []byte }
		}
		var before, after response
		was := json.Unmarshal(doc, &before)
		plain, rest, err := cutPlaintext(bytes.Clone(doc))
		if err != nil || was != nil {
			return
		}
		if err := json.Unmarshal(rest, &after); err != nil {
			t.Fatalf("%q: the rest %q is broken: %v", doc, rest, err)
		}
		if len(after.Response.Plaintext) > 0 {
			t.Fatalf("%q: the rest still has plaintext: %q", doc, rest)
		}
		if !bytes.Equal(plain, before.Response.Plaintext) {
			t.Fatalf("%q: cut %q, encoding/json finds %q", doc, plain, before.Response.Plaintext)
		}
	})
}
