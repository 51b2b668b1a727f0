// Package kmstest emulates the Tencent Cloud KMS API (version 2019-01-18) over
// TLS, strictly enough that a client which works against it and against
// nothing else has still had its signatures, tokens, parameters and error
// handling checked. It is written from the public API documents and shares no
// code with the client in this repository, so that each checks the other.
//
// # In a test
//
//	srv := kmstest.New(t)
//	key := srv.CreateKey("shop")
//	blob := srv.Encrypt(key, []byte("secret"), "")  // as the console would make it
//	cred := srv.Credential()                        // SecretID, SecretKey
//	// give the client srv.Addr(), srv.CAFile(), srv.Region(), cred and key
//	srv.Queue("Decrypt", kmstest.Repeat(2, kmstest.Refusal("RequestLimitExceeded"))...)
//	// ... use the client ...
//	for _, r := range srv.Requests() { ... r.Action, r.Response, r.RequestID ... }
//
// Everything a [Server] does may be called from any goroutine. Nothing in it
// waits for wall-clock time unless a latency or a delay was asked for, and
// [Server.Wait] waits for requests to arrive, so that no test needs to sleep.
//
// # By hand
//
//	go run ./kmsclient/kmstest/cmd/kmsemu -dir /tmp/kmsemu
//
// prints the configuration that uses it.
//
// # What it checks, in this order
//
// Size of the body (10 MB), POST, path and content type, X-TC-Action,
// X-TC-Version, the form of Authorization, X-TC-Timestamp (five minutes either
// way), the credential scope, SecretId, X-TC-Token and its expiry, the
// TC3-HMAC-SHA256 signature over whatever SignedHeaders names (content-type
// and host at least), X-TC-Region, the quota, the action, its parameters
// (unknown, missing and mistyped ones are refused), the credential's
// permission for the key, and the state of the key.
//
// Errors are answered as the service does: HTTP 200 and a body with an Error.
// GET requests are refused although the service has them, because they put
// plaintext into URLs.
//
// # Ciphertext
//
// A CiphertextBlob has the three base64 parts and the exact length of one from
// the production service (16 bytes of plaintext make 190 characters, 4096 make
// 5630). It names the key and its version, so blobs made before a rotation
// stay readable, and is authenticated together with the EncryptionContext by
// 128 bits. A blob that was changed and one decrypted with another context are
// indistinguishable, as with any AEAD.
//
// # What is undocumented
//
// Where the public documents are silent the default is the likeliest reading
// of each action's list of error codes, and a field of [Options] changes it:
// MismatchCode, PendingDeleteCode, PendingImportCode, ExpiredTokenCode,
// OversizeCode, EmptyPlaintext, SortContext, DisableDelay. A client should
// pass its tests under either value.
//
// Not emulated: asymmetric and imported keys, SM2 public keys, white-box and
// hosted data keys, tags, and everything about money.
//
// # Faults
//
// [Server.SetFault] and [Server.Queue] make single requests go wrong, see
// [Fault]; [Server.Hang] and [Server.SetNetwork] take the whole service away;
// [Server.SetLatency], [Server.SetRateLimit] and [Server.SetSkew] make it slow,
// busy, or live in another time. [NewMetadata] is the instance metadata
// endpoint that hands out credentials of a role, with faults of its own.
package kmstest
