package kmstest

import (
	"cmp"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	maxPlaintext = 4096
	maxContext   = 1024
	maxRandom    = 1024
	creatorUin   = 100000000001
	usageEncrypt = "ENCRYPT_DECRYPT"
)

func (s *Server) newActions() map[string]action {
	return map[string]action{
		"Encrypt":             with(s.encrypt),
		"Decrypt":             with(s.decrypt),
		"GenerateDataKey":     with(s.generateDataKey),
		"ReEncrypt":           with(s.reEncrypt),
		"GenerateRandom":      with(s.generateRandom),
		"CreateKey":           with(s.apiCreateKey),
		"DescribeKey":         with(s.describeKey),
		"DescribeKeys":        with(s.describeKeys),
		"ListKeys":            with(s.listKeys),
		"ListKeyDetail":       with(s.listKeyDetail),
		"EnableKey":           with(s.enableKey),
		"DisableKey":          with(s.disableKey),
		"ArchiveKey":          with(s.archiveKey),
		"CancelKeyArchive":    with(s.cancelKeyArchive),
		"RotateKey":           with(s.rotateKey),
		"ScheduleKeyDeletion": with(s.scheduleKeyDeletion),
		"CancelKeyDeletion":   with(s.cancelKeyDeletion),
		"GetServiceStatus":    with(s.getServiceStatus),
	}
}

// Cryptographic actions.

type encryptParams struct {
	KeyId             string `api:"required"`
	Plaintext         string `api:"required"`
	EncryptionContext string
}

func (s *Server) encrypt(c *call, p encryptParams) (fields, error) {
	context, err := s.checkContext(p.EncryptionContext)
	if err != nil {
		return nil, err
	}
	plaintext, ok := decodeBase64(p.Plaintext)
	if !ok || len(plaintext) > maxPlaintext || len(plaintext) == 0 && !s.opts.EmptyPlaintext {
		return nil, refuse(codeInvalidPlaintext, "Plaintext must be base64 of at most %d bytes.", maxPlaintext)
	}
	k, err := s.key(c, p.KeyId)
	if err != nil {
		return nil, err
	}
	if err := s.canSeal(c, k); err != nil {
		return nil, err
	}
	return fields{"KeyId": k.ID, "CiphertextBlob": s.vault.seal(k, plaintext, context)}, nil
}

type decryptParams struct {
	CiphertextBlob      string `api:"required"`
	EncryptionContext   string
	EncryptionPublicKey string
	EncryptionAlgorithm string
}

func (s *Server) decrypt(c *call, p decryptParams) (fields, error) {
	reply, err := s.replyFor(p.EncryptionPublicKey, p.EncryptionAlgorithm)
	if err != nil {
		return nil, err
	}
	k, _, plaintext, err := s.open(c, p.CiphertextBlob, p.EncryptionContext)
	if err != nil {
		return nil, err
	}
	text, err := reply(plaintext)
	if err != nil {
		return nil, err
	}
	return fields{"KeyId": k.ID, "Plaintext": text}, nil
}

// open decrypts a blob for a caller.
func (s *Server) open(c *call, text, context string) (cmk, blob, []byte, error) {
	fail := func(err error) (cmk, blob, []byte, error) { return cmk{}, blob{}, nil, err }
	context, err := s.checkContext(context)
	if err != nil {
		return fail(err)
	}
	b, ok := s.vault.parse(text)
	if !ok {
		return fail(refuse(codeInvalidCiphertext, "CiphertextBlob has a wrong format."))
	}
	k, err := s.key(c, b.key.String())
	if err != nil {
		return fail(err)
	}
	if err := s.canOpen(c, k); err != nil {
		return fail(err)
	}
	mismatch := refuse(s.opts.MismatchCode, "CiphertextBlob cannot be decrypted with this EncryptionContext.")
	if b.version >= len(k.Versions) {
		return fail(mismatch)
	}
	plaintext, ok := b.open(k.Versions[b.version], context)
	if !ok {
		return fail(mismatch)
	}
	return k, b, plaintext, nil
}

type generateDataKeyParams struct {
	KeyId               string `api:"required"`
	KeySpec             string
	NumberOfBytes       *uint64
	EncryptionContext   string
	EncryptionPublicKey string
	EncryptionAlgorithm string
	IsHostedByKms       uint64
	DataKeyName         string
	Description         string
	HsmClusterId        string
	Tags                []tag
}

func (s *Server) generateDataKey(c *call, p generateDataKeyParams) (fields, error) {
	if p.IsHostedByKms != 0 {
		return nil, refuse(codeUnsupported, "Hosted data keys are not emulated.")
	}
	size, err := dataKeySize(p.KeySpec, p.NumberOfBytes)
	if err != nil {
		return nil, err
	}
	context, err := s.checkContext(p.EncryptionContext)
	if err != nil {
		return nil, err
	}
	reply, err := s.replyFor(p.EncryptionPublicKey, p.EncryptionAlgorithm)
	if err != nil {
		return nil, err
	}
	k, err := s.key(c, p.KeyId)
	if err != nil {
		return nil, err
	}
	if k.State == statePendingDelete {
		return nil, refuse(codeKeyPendingDelete, "The CMK is pending deletion.")
	}
	if err := s.canSeal(c, k); err != nil {
		return nil, err
	}
	plaintext := randomBytes(size)
	text, err := reply(plaintext)
	if err != nil {
		return nil, err
	}
	return fields{"KeyId": k.ID, "Plaintext": text, "CiphertextBlob": s.vault.seal(k, plaintext, context)}, nil
}

func dataKeySize(spec string, bytes *uint64) (int, error) {
	switch {
	case bytes != nil && *bytes >= 1 && *bytes <= maxRandom:
		return int(*bytes), nil
	case bytes != nil:
		return 0, refuse(codeInvalidParameter, "NumberOfBytes must be from 1 to %d.", maxRandom)
	case spec == "AES_128":
		return 16, nil
	case spec == "AES_256":
		return 32, nil
	}
	return 0, refuse(codeInvalidParameter, "KeySpec must be AES_128 or AES_256, or NumberOfBytes be given.")
}

type reEncryptParams struct {
	CiphertextBlob               string `api:"required"`
	DestinationKeyId             string
	SourceEncryptionContext      string
	DestinationEncryptionContext string
}

func (s *Server) reEncrypt(c *call, p reEncryptParams) (fields, error) {
	context, err := s.checkContext(p.DestinationEncryptionContext)
	if err != nil {
		return nil, err
	}
	source, b, plaintext, err := s.open(c, p.CiphertextBlob, p.SourceEncryptionContext)
	if err != nil {
		return nil, err
	}
	target, err := s.key(c, cmp.Or(p.DestinationKeyId, source.ID))
	if err != nil {
		return nil, err
	}
	if err := s.canSeal(c, target); err != nil {
		return nil, err
	}
	result := fields{"KeyId": target.ID, "SourceKeyId": source.ID, "CiphertextBlob": p.CiphertextBlob, "ReEncrypted": false}
	current := target.ID == source.ID && b.version == len(target.Versions)-1
	if !current || p.SourceEncryptionContext != p.DestinationEncryptionContext {
		result["CiphertextBlob"], result["ReEncrypted"] = s.vault.seal(target, plaintext, context), true
	}
	return result, nil
}

type generateRandomParams struct {
	NumberOfBytes uint64 `api:"required"`
}

func (s *Server) generateRandom(c *call, p generateRandomParams) (fields, error) {
	if err := c.authorize(""); err != nil {
		return nil, err
	}
	if p.NumberOfBytes < 1 || p.NumberOfBytes > maxRandom {
		return nil, refuse(codeInvalidParameter, "NumberOfBytes must be from 1 to %d.", maxRandom)
	}
	text, err := clearReply(randomBytes(int(p.NumberOfBytes)))
	return fields{"Plaintext": text}, err
}

// checkContext returns an EncryptionContext as it is bound into blobs.
func (s *Server) checkContext(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	var pairs map[string]string
	if err := json.Unmarshal([]byte(text), &pairs); err != nil || pairs == nil || len(text) > maxContext {
		return "", refuse(codeInvalidParameter, "EncryptionContext must be a JSON object of strings of at most %d bytes.", maxContext)
	}
	if !s.opts.SortContext {
		return text, nil
	}
	sorted, err := json.Marshal(pairs)
	return string(sorted), err
}

// key finds a key the caller may use.
func (s *Server) key(c *call, id string) (cmk, error) {
	if err := checkKeyID(c, id); err != nil {
		return cmk{}, err
	}
	k, ok := s.vault.find(id, c.region, c.now)
	if !ok {
		return cmk{}, noSuchKey(id)
	}
	return k, nil
}

func checkKeyID(c *call, id string) error {
	if _, ok := parseUUID(id); !ok {
		return refuse(codeInvalidKeyID, "The KeyId `%s` is not valid.", id)
	}
	return c.authorize(id)
}

func noSuchKey(id string) error {
	return refuse(codeCmkNotFound, "The CMK `%s` does not exist in this region.", id)
}

// canSeal and canOpen refuse keys in a state that forbids it.
func (s *Server) canSeal(c *call, k cmk) error {
	if k.State == stateArchived {
		return refuse(codeCmkArchived, "The CMK is archived.")
	}
	return s.canOpen(c, k)
}

func (s *Server) canOpen(c *call, k cmk) error {
	switch k.State {
	case stateEnabled, stateArchived:
		return nil
	case statePendingDelete:
		return refuse(s.opts.PendingDeleteCode, "The CMK is pending deletion.")
	case statePendingImport:
		return refuse(s.opts.PendingImportCode, "The CMK has no key material.")
	}
	if c.now.Before(k.UsableUntil) {
		return nil
	}
	return refuse(codeCmkDisabled, "The CMK is disabled.")
}

// Management actions.

type createKeyParams struct {
	Alias        string `api:"required"`
	Description  string
	KeyUsage     string
	Type         *uint64
	Tags         []tag
	HsmClusterId string
}

var aliasForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$`)

func validAlias(alias string) bool {
	return aliasForm.MatchString(alias) && !strings.HasPrefix(strings.ToLower(alias), "kms-")
}

func (s *Server) apiCreateKey(c *call, p createKeyParams) (fields, error) {
	if err := c.authorize(""); err != nil {
		return nil, err
	}
	k, err := newKey(c, p)
	if err != nil {
		return nil, err
	}
	err = s.vault.add(k, c.now, func(keys []*cmk) error {
		if slices.ContainsFunc(keys, func(other *cmk) bool { return other.Alias == k.Alias }) {
			return refuse(codeAliasExists, "The alias `%s` already exists.", k.Alias)
		}
		if len(keys) >= s.opts.KeyLimit {
			return refuse(codeCmkLimit, "There are %d CMKs already.", len(keys))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.keyID = k.ID
	return fields{
		"KeyId": k.ID, "Alias": k.Alias, "CreateTime": k.Created.Unix(), "Description": k.Description,
		"KeyState": k.State, "KeyUsage": usageEncrypt, "TagCode": 0, "TagMsg": "", "HsmClusterId": "",
	}, nil
}

func newKey(c *call, p createKeyParams) (cmk, error) {
	k := cmk{ID: newUUID(), Region: c.region, Alias: p.Alias, Description: p.Description, Created: c.now}
	k.rotate(c.now)
	if !validAlias(p.Alias) {
		return k, refuse(codeInvalidAlias, "The alias `%s` is not valid.", p.Alias)
	}
	if len(p.Description) > 1024 {
		return k, refuse(codeInvalidParameter, "The Description is longer than 1024 bytes.")
	}
	switch usage := cmp.Or(p.KeyUsage, usageEncrypt); {
	case usage == usageEncrypt:
	case strings.HasPrefix(usage, "ASYMMETRIC_"):
		return k, refuse(codeUsageInRegion, "KeyUsage `%s` is not emulated.", usage)
	default:
		return k, refuse(codeInvalidKeyUsage, "There is no KeyUsage `%s`.", usage)
	}
	k.State, k.Origin = stateEnabled, originKMS
	if p.Type != nil && *p.Type == 2 {
		k.State, k.Origin = statePendingImport, originExternal
	} else if p.Type != nil && *p.Type != 1 {
		return k, refuse(codeInvalidType, "There is no Type %d.", *p.Type)
	}
	return k, nil
}

type keyParams struct {
	KeyId         string `api:"required"`
	MemberAccount *memberAccount
}

func (s *Server) describeKey(c *call, p keyParams) (fields, error) {
	k, err := s.key(c, p.KeyId)
	if err != nil {
		return nil, err
	}
	return fields{"KeyMetadata": k.metadata()}, nil
}

type describeKeysParams struct {
	KeyIds        []string `api:"required"`
	MemberAccount *memberAccount
}

func (s *Server) describeKeys(c *call, p describeKeysParams) (fields, error) {
	if len(p.KeyIds) == 0 || len(p.KeyIds) > 100 {
		return nil, refuse(codeInvalidParameter, "KeyIds must have from 1 to 100 ids.")
	}
	seen := map[string]bool{}
	list := []fields{}
	for _, id := range p.KeyIds {
		if seen[id] {
			return nil, refuse(codeDuplicatedKeyID, "The KeyId `%s` is there twice.", id)
		}
		seen[id] = true
		k, err := s.key(c, id)
		if err != nil {
			return nil, err
		}
		list = append(list, k.metadata())
	}
	return fields{"KeyMetadatas": list}, nil
}

func (k cmk) metadata() fields {
	return fields{
		"KeyId": k.ID, "Alias": k.Alias, "Description": k.Description, "KeyState": k.State, "KeyUsage": usageEncrypt,
		"Type": 2, "Origin": k.Origin, "Owner": "user", "CreatorUin": creatorUin,
		"ResourceId": "creatorUin/100000000001/" + k.ID, "HsmClusterId": "", "KeyRotationEnabled": false,
		"CreateTime": k.Created.Unix(), "DeletionDate": unixOrZero(k.Deletion), "LastRotateTime": unixOrZero(k.Rotated),
		"NextRotateTime": 0, "ValidTo": 0,
	}
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

type listKeysParams struct {
	Offset, Limit, Role *uint64
	HsmClusterId        string
}

func (s *Server) listKeys(c *call, p listKeysParams) (fields, error) {
	listed := []string{stateEnabled, stateDisabled, statePendingImport}
	keys, total, err := s.page(c, p, func(k cmk) bool { return slices.Contains(listed, k.State) })
	if err != nil {
		return nil, err
	}
	list := []fields{}
	for _, k := range keys {
		list = append(list, fields{"KeyId": k.ID})
	}
	return fields{"Keys": list, "TotalCount": total}, nil
}

type listKeyDetailParams struct {
	Offset, Limit, Role, OrderType, KeyState       *uint64
	SearchKeyAlias, Origin, KeyUsage, HsmClusterId string
	TagFilters, MemberAccounts                     []json.RawMessage
}

func (s *Server) listKeyDetail(c *call, p listKeyDetailParams) (fields, error) {
	states := []string{"", stateEnabled, stateDisabled, statePendingDelete, statePendingImport, stateArchived}
	wanted := valueOr(p.KeyState, 0)
	if wanted >= uint64(len(states)) {
		return nil, refuse(codeInvalidParameter, "There is no KeyState %d.", wanted)
	}
	keys, total, err := s.page(c, listKeysParams{Offset: p.Offset, Limit: p.Limit, Role: p.Role}, func(k cmk) bool {
		return (wanted == 0 || k.State == states[wanted]) &&
			(p.Origin == "" || p.Origin == "ALL" || p.Origin == k.Origin) &&
			(p.KeyUsage == "" || p.KeyUsage == "ALL" || p.KeyUsage == usageEncrypt) &&
			strings.Contains(k.Alias, p.SearchKeyAlias)
	})
	if err != nil {
		return nil, err
	}
	if valueOr(p.OrderType, 0) == 1 {
		slices.Reverse(keys)
	}
	list := []fields{}
	for _, k := range keys {
		list = append(list, k.metadata())
	}
	return fields{"KeyMetadatas": list, "TotalCount": total}, nil
}

// page returns the part of the caller's keys that was asked for, and how many
// there are in all.
func (s *Server) page(c *call, p listKeysParams, match func(cmk) bool) ([]cmk, int, error) {
	if err := c.authorize(""); err != nil {
		return nil, 0, err
	}
	limit, offset := valueOr(p.Limit, 10), valueOr(p.Offset, 0)
	if limit < 1 || limit > 200 {
		return nil, 0, refuse(codeInvalidParameter, "Limit must be from 1 to 200.")
	}
	keys := slices.DeleteFunc(s.vault.list(c.region, c.now), func(k cmk) bool { return !match(k) })
	if valueOr(p.Role, 0) != 0 {
		keys = nil // no key of ours belongs to a cloud product
	}
	total := len(keys)
	first := min(offset, uint64(total))
	last := min(first+limit, uint64(total))
	return keys[first:last], total, nil
}

func valueOr(p *uint64, fallback uint64) uint64 {
	if p == nil {
		return fallback
	}
	return *p
}

func (s *Server) enableKey(c *call, p keyParams) (fields, error) {
	return s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateEnabled && k.State != stateDisabled {
			return wrongState(k)
		}
		k.State, k.UsableUntil = stateEnabled, time.Time{}
		return nil
	})
}

func (s *Server) disableKey(c *call, p keyParams) (fields, error) {
	return s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateEnabled && k.State != stateDisabled {
			return wrongState(k)
		}
		k.disable(c.now, s.opts.DisableDelay)
		return nil
	})
}

func (s *Server) archiveKey(c *call, p keyParams) (fields, error) {
	return s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateEnabled && k.State != stateDisabled {
			return wrongState(k)
		}
		k.State = stateArchived
		return nil
	})
}

func (s *Server) cancelKeyArchive(c *call, p keyParams) (fields, error) {
	return s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateArchived {
			return wrongState(k)
		}
		k.State = stateEnabled
		return nil
	})
}

func (s *Server) rotateKey(c *call, p keyParams) (fields, error) {
	result, err := s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateEnabled {
			return wrongState(k)
		}
		if !k.Rotated.IsZero() && c.now.Sub(k.Rotated) < 24*time.Hour {
			return refuse(codeRotateLimit, "The CMK was rotated in the last 24 hours.")
		}
		k.rotate(c.now)
		return nil
	})
	if err == nil {
		result["TaskId"] = newUUID()
	}
	return result, err
}

type scheduleKeyDeletionParams struct {
	KeyId               string `api:"required"`
	PendingWindowInDays uint64 `api:"required"`
	MemberAccount       *memberAccount
}

func (s *Server) scheduleKeyDeletion(c *call, p scheduleKeyDeletionParams) (fields, error) {
	if p.PendingWindowInDays < 7 || p.PendingWindowInDays > 30 {
		return nil, refuse(codeBadPendingWindow, "PendingWindowInDays must be from 7 to 30.")
	}
	var deletion time.Time
	_, err := s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != stateDisabled {
			return refuse(codeShouldBeDisabled, "Only a disabled CMK can be scheduled for deletion.")
		}
		k.scheduleDeletion(c.now, int(p.PendingWindowInDays))
		deletion = k.Deletion
		return nil
	})
	if err != nil {
		return nil, err
	}
	return fields{"KeyId": p.KeyId, "DeletionDate": deletion.Unix()}, nil
}

func (s *Server) cancelKeyDeletion(c *call, p keyParams) (fields, error) {
	_, err := s.transition(c, p.KeyId, func(k *cmk) error {
		if k.State != statePendingDelete {
			return refuse(codeNotPendingDelete, "The CMK is not pending deletion.")
		}
		k.State, k.Deletion = stateDisabled, time.Time{}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return fields{"KeyId": p.KeyId}, nil
}

// transition changes the state of a key the caller may change.
func (s *Server) transition(c *call, id string, change func(*cmk) error) (fields, error) {
	if err := checkKeyID(c, id); err != nil {
		return nil, err
	}
	_, err := s.vault.update(id, c.region, c.now, change)
	if errors.Is(err, errNoKey) {
		return nil, noSuchKey(id)
	}
	return fields{}, err
}

func wrongState(k *cmk) error {
	return refuse(codeCmkState, "The CMK is in the state `%s`, which does not allow this.", k.State)
}

func (s *Server) getServiceStatus(c *call, _ struct{}) (fields, error) {
	if err := c.authorize(""); err != nil {
		return nil, err
	}
	return fields{
		"ServiceEnabled": true, "InvalidType": 1, "UserLevel": 0, "ProExpireTime": 0, "ProRenewFlag": 0,
		"ProResourceId": "", "ExclusiveVSMEnabled": false, "ExclusiveHSMEnabled": false,
		"CmkUserCount": len(s.vault.list(c.region, c.now)), "CmkLimit": s.opts.KeyLimit,
	}, nil
}
