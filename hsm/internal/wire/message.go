package wire

// Config is the first message a worker gets.
type Config struct {
	Module string // path
	Args   string // handed to C_Initialize
}

// Hello is the first message a worker sends. Fatal says why it cannot work.
type Hello struct {
	Fatal string `json:",omitempty"`
}

// An Op is what a request asks for.
type Op string

// The requests.
const (
	Unwrap Op = "unwrap" // secret of the reply: the file key
	Wrap   Op = "wrap"   // secret of the request: the file key
	Probe  Op = "probe"
	Login  Op = "login" // secret of the request: the PIN
)

// A Selector names one key of one token, as an RFC 7512 URI does. Empty
// attributes match anything.
type Selector struct {
	Token, Serial, Manufacturer, Model string
	Slot                               *uint `json:",omitempty"`
	Object                             string
	ID                                 []byte
	Type                               string // "", "secret-key" or "rsa"
}

// A Request is one operation for the worker.
type Request struct {
	Number   uint64
	Op       Op
	Key      Selector
	Mode     string // "" when wrapping: the best the key and token can do
	IV       string // who makes the GCM IV: "app", "param", "appended"
	Context  []byte // canonical
	Body     []byte
	CanLogin bool // there is a PIN to be had
	Revived  bool // the module was initialised anew for this one already
}

// A Status says how a request ended.
type Status string

// The ends of a request.
const (
	OK          Status = "ok"
	NeedPIN     Status = "need-pin"
	BadPIN      Status = "bad-pin" // the token refused it: final
	BadWrapping Status = "bad-wrapping"
	Denied      Status = "denied"
	Gone        Status = "gone"
	Unavailable Status = "unavailable"
)

// A Reply answers the request of the same number.
type Reply struct {
	Number uint64
	Status Status
	Text   string `json:",omitempty"` // for people
	Mode   string `json:",omitempty"` // of a wrap
	Body   []byte `json:",omitempty"` // of a wrap
	Token  *Token `json:",omitempty"` // of need-pin
}

// Token is what the daemon must know before it hands out a PIN.
type Token struct {
	Label, Serial string
	Slot          uint
	Epoch         uint64 // changes whenever a login is lost
	Flags         uint   // CK_TOKEN_INFO.flags
	Revived       bool   // goes into the next request
}
