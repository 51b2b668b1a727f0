// Package kmsclient holds CMKs in Tencent Cloud KMS: a [keyring.Backend] for
// keys named tencentkms:<region>/<KeyId>, over the official SDK.
//
// It promises:
//
//   - No file key crosses the HTTP stack in clear. Each Decrypt of a file key
//     carries an RSA public key made for this process, and the service answers
//     under it. A blob too large for that is cut out of the response in locked
//     memory before the SDK sees the rest.
//   - No error, log line or trace holds anything the service sent except an error
//     code and a RequestId. The SDK's own error texts quote whole responses.
//   - Every call ends soon after its context, and after [Options].Timeout at the
//     latest: connecting, waiting for credentials and reading bodies included.
//   - An answer for another key than the one asked for is refused.
//   - HTTPS only, POST only, no proxy, no redirects, no retries but one: with
//     fresh credentials, after the service refused the old ones.
//
// # Credentials
//
// The first of these that is there is used; [Client.Credentials] tells which:
//
//  1. files tencentcloud-secret-id, tencentcloud-secret-key and, if need be,
//     tencentcloud-token in $CREDENTIALS_DIRECTORY (LoadCredential= of systemd)
//  2. the role of the instance, from the metadata service
//  3. TKE_ROLE_ARN, TKE_PROVIDER_ID, TKE_REGION and TKE_WEB_IDENTITY_TOKEN_FILE,
//     as TKE gives them to a pod with a service account
//  4. TENCENTCLOUD_SECRET_ID, TENCENTCLOUD_SECRET_KEY and TENCENTCLOUD_TOKEN
//  5. profile default of $TENCENTCLOUD_CREDENTIALS_FILE, else of
//     ~/.tencentcloud/credentials, which nobody but its owner may read
//
// The metadata service is given two seconds. A machine whose firmware does not
// say that it belongs to Tencent Cloud is asked for a role last instead of
// second, so that no key in the environment of a laptop waits for a service that
// is not there; naming a metadata endpoint in the options restores the order.
// A source that is there but broken (half a pair, a readable profile) is an
// error, not a reason to go on.
//
// Temporary credentials are renewed in the background ten minutes before they
// expire, and at once when the service refuses them.
//
// # What remains in memory
//
// SecretKey and token are Go strings, because the SDK takes nothing else. Wrap
// and SealBlob put the base64 of what they encrypt into the request, which the
// SDK and net/http copy several times: only the short-lived command line calls
// them for secrets, never the daemon, whose Probe wraps a random key of no use.
//
// Unwrap and OpenBlob leave nothing: the buffers of crypto/tls are cleared when a
// connection goes back to waiting or is closed. Two crumbs can escape that from an answer
// in clear, which only a blob of more than 175 bytes gets: sixteen bytes of it in the
// read buffer of net/http, if the service sends it in chunks, until the next answer; and
// what arrived with the headers, if the caller gives up in that very moment, until the
// garbage collector reuses the memory.
package kmsclient
