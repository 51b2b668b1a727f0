package main

import (
	"os"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

	"kmsfs/hsm/hsmtest"
	"kmsfs/kmsclient/kmstest"
)

// kmsOf is the emulator of one script.
type kmsOf struct {
	*kmstest.Server
	key     string
	release func()
}

type kmsKey struct{}

// kms start makes an emulator with a CMK and tells the script in $KMS_KEY and
// $KMS_CONF; kms enable|disable|hang|release|reset acts on it, and kms count ACTION N
// demands so many requests since the last reset.
func kms(ts *testscript.TestScript, neg bool, args []string) {
	if args[0] == "start" {
		startKMS(ts)
		return
	}
	s := ts.Value(kmsKey{}).(*kmsOf)
	switch args[0] {
	case "enable":
		s.Enable(s.key)
	case "disable":
		s.Disable(s.key)
	case "hang":
		s.release = s.Hang()
	case "release":
		s.release()
	case "reset":
		s.ResetRequests()
	case "count":
		want, err := strconv.Atoi(args[2])
		ts.Check(err)
		if got := s.Count(args[1]); got != want {
			ts.Fatalf("%d requests for %s, want %d", got, args[1], want)
		}
	case "blob": // as the console makes it: kms blob FILE PLAINTEXT CONTEXT
		blob := s.Encrypt(s.key, []byte(args[2]), args[3])
		ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(blob), 0o600))
	default:
		ts.Fatalf("unknown: kms %s", args[0])
	}
}

func startKMS(ts *testscript.TestScript) {
	srv, err := kmstest.Start(kmstest.Options{})
	ts.Check(err)
	ts.Defer(srv.Close)
	s := ts.Value(kmsKey{}).(*kmsOf)
	s.Server, s.key = srv, srv.CreateKey("shop")
	ts.Setenv("KMS_KEY", "tencentkms:"+srv.Region()+"/"+s.key)
	ca := ts.MkAbs("ca.pem")
	ts.Check(os.WriteFile(ca, srv.CAPEM(), 0o644))
	ts.Setenv("KMS_CONF", "[tencentkms]\nendpoint = \""+srv.Addr()+"\"\nca_file = \""+ca+"\"\n")
	ts.Setenv("TENCENTCLOUD_SECRET_ID", srv.Credential().SecretID)
	ts.Setenv("TENCENTCLOUD_SECRET_KEY", srv.Credential().SecretKey)
}

// softhsm makes a token and tells the script in $HSM_KEY and $HSM_CONF.
func softhsm(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs("hsm")
	ts.Check(os.Mkdir(dir, 0o700))
	token, err := hsmtest.New(dir, "shop")
	if err != nil {
		ts.Fatalf("%v (%s)", err, hsmtest.Install)
	}
	ts.Setenv("HSM_KEY", token.AES)
	ts.Setenv("HSM_PIN", token.PINFile)
	ts.Setenv("HSM_CONF", "[pkcs11]\nenv = { SOFTHSM2_CONF = \""+token.Conf+"\" }\n")
}
