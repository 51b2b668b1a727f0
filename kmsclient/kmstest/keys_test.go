package kmstest_test

import (
	"encoding/base64"
	"slices"
	"testing"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/kmsclient/kmstest"
)

// A key's life as its owner lives it, by the SDK.
func TestKeyLifeCycle(t *testing.T) {
	srv := kmstest.New(t)
	c := newSDK(t, srv, srv.Credential())
	create := kms.NewCreateKeyRequest()
	create.Alias, create.Description = common.StringPtr("shop"), common.StringPtr("for the shop")
	made := must[*kms.CreateKeyResponse](t)(c.CreateKey(create)).Response
	key := made.KeyId
	if *made.KeyState != "Enabled" || *made.Alias != "shop" || *made.KeyUsage != "ENCRYPT_DECRYPT" {
		t.Errorf("created %s", *key)
	}
	state := func(want string) {
		t.Helper()
		q := kms.NewDescribeKeyRequest()
		q.KeyId = key
		m := must[*kms.DescribeKeyResponse](t)(c.DescribeKey(q)).Response.KeyMetadata
		if *m.KeyState != want || *m.KeyId != *key || *m.Description != "for the shop" || *m.Origin != "TENCENT_KMS" {
			t.Errorf("state %s, want %s", *m.KeyState, want)
		}
		if (*m.DeletionDate != 0) != (want == "PendingDelete") {
			t.Errorf("in state %s, DeletionDate %d", want, *m.DeletionDate)
		}
	}
	enable := func() string {
		q := kms.NewEnableKeyRequest()
		q.KeyId = key
		_, err := c.EnableKey(q)
		return sdkCode(err)
	}
	disable := func() string {
		q := kms.NewDisableKeyRequest()
		q.KeyId = key
		_, err := c.DisableKey(q)
		return sdkCode(err)
	}
	cancel := func() string {
		q := kms.NewCancelKeyDeletionRequest()
		q.KeyId = key
		_, err := c.CancelKeyDeletion(q)
		return sdkCode(err)
	}
	schedule := func(days uint64) string {
		q := kms.NewScheduleKeyDeletionRequest()
		q.KeyId, q.PendingWindowInDays = key, &days
		_, err := c.ScheduleKeyDeletion(q)
		return sdkCode(err)
	}
	archive := func() string {
		q := kms.NewArchiveKeyRequest()
		q.KeyId = key
		_, err := c.ArchiveKey(q)
		return sdkCode(err)
	}
	unarchive := func() string {
		q := kms.NewCancelKeyArchiveRequest()
		q.KeyId = key
		_, err := c.CancelKeyArchive(q)
		return sdkCode(err)
	}
	for i, step := range []struct{ code, want, state string }{
		{schedule(7), "ResourceUnavailable.CmkShouldBeDisabled", "Enabled"},
		{cancel(), "ResourceUnavailable.CmkNotPendingDelete", "Enabled"},
		{unarchive(), "ResourceUnavailable.CmkStateNotSupport", "Enabled"},
	} {
		if step.code != step.want {
			t.Errorf("refusal %d: %q, want %q", i, step.code, step.want)
		}
	}
	state("Enabled")
	for _, step := range []struct {
		name  string
		do    func() string
		code  string
		state string
	}{
		{"archive", archive, "", "Archived"},
		{"unarchive", unarchive, "", "Enabled"},
		{"disable", disable, "", "Disabled"},
		{"schedule 6", func() string { return schedule(6) }, "InvalidParameter.InvalidPendingWindowInDays", "Disabled"},
		{"schedule 31", func() string { return schedule(31) }, "InvalidParameter.InvalidPendingWindowInDays", "Disabled"},
		{"schedule 7", func() string { return schedule(7) }, "", "PendingDelete"},
		{"enable", enable, "ResourceUnavailable.CmkStateNotSupport", "PendingDelete"},
		{"cancel", cancel, "", "Disabled"},
		{"enable", enable, "", "Enabled"},
		{"disable", disable, "", "Disabled"},
		{"schedule 7", func() string { return schedule(7) }, "", "PendingDelete"},
	} {
		if got := step.do(); got != step.code {
			t.Errorf("%s: %q, want %q", step.name, got, step.code)
		}
		state(step.state)
	}
	blob := srv.Encrypt(*key, []byte("x"), "")
	tr := transport(t, srv)
	srv.SetSkew(7*24*time.Hour + time.Minute)
	late := hand{action: "Decrypt", body: `{"CiphertextBlob":"` + blob + `"}`, time: time.Now().Add(7*24*time.Hour + time.Minute)}
	if a := send(t, tr, late.request(t, srv)); a.Response.Error.Code != "ResourceUnavailable.CmkNotFound" {
		t.Errorf("after its deletion: %s", a.body)
	}
}

// What each action answers for a key in each state.
func TestKeyStates(t *testing.T) {
	const disabled, archived, missing = "ResourceUnavailable.CmkDisabled", "ResourceUnavailable.CmkArchived", "ResourceUnavailable.CmkNotFound"
	srv := kmstest.New(t)
	tr := transport(t, srv)
	for _, test := range []struct {
		state                             string
		set                               func(string)
		encrypt, decrypt, dataKey, reSeal string
	}{
		{"Enabled", func(string) {}, "", "", "", ""},
		{"Disabled", srv.Disable, disabled, disabled, disabled, disabled},
		{"Archived", srv.Archive, archived, "", archived, archived},
		{"PendingDelete", srv.ScheduleDeletion, disabled, disabled, "ResourceUnavailable.KeyPendingDelete", disabled},
		{"", srv.Delete, missing, missing, missing, missing},
	} {
		key := srv.CreateKey("key-" + test.state)
		blob := srv.Encrypt(key, []byte("x"), "")
		test.set(key)
		if got := srv.KeyState(key); got != test.state {
			t.Errorf("state %s, want %s", got, test.state)
		}
		for action, want := range map[string][2]string{
			"Encrypt":         {`{"KeyId":"` + key + `","Plaintext":"eA=="}`, test.encrypt},
			"Decrypt":         {`{"CiphertextBlob":"` + blob + `"}`, test.decrypt},
			"GenerateDataKey": {`{"KeyId":"` + key + `","KeySpec":"AES_128"}`, test.dataKey},
			"ReEncrypt":       {`{"CiphertextBlob":"` + blob + `"}`, test.reSeal},
		} {
			a := send(t, tr, hand{action: action, body: want[0]}.request(t, srv))
			if a.Response.Error.Code != want[1] {
				t.Errorf("%s with a key that is %s: %q, want %q", action, test.state, a.Response.Error.Code, want[1])
			}
			if want[1] != "" && (a.Response.Plaintext != "" || a.Response.CiphertextBlob != "") {
				t.Errorf("%s with a key that is %s: refused with a result: %s", action, test.state, a.body)
			}
		}
	}
}

func TestDisabledKeyWorksForAMoment(t *testing.T) {
	now := time.Now()
	srv := kmstest.New(t, func(o *kmstest.Options) {
		o.DisableDelay = 5 * time.Second
		o.Now = func() time.Time { return now }
	})
	c, key := newSDK(t, srv, srv.Credential()), srv.CreateKey("a")
	srv.Disable(key)
	if _, err := sdkEncrypt(c, key, "", []byte("x")); err != nil {
		t.Errorf("at once: %v", err)
	}
	srv.SetSkew(5 * time.Second)
	if _, err := sdkEncrypt(c, key, "", []byte("x")); sdkCode(err) != "ResourceUnavailable.CmkDisabled" {
		t.Errorf("5 s later: %v", err)
	}
}

func TestKeysBelongToTheirRegion(t *testing.T) {
	srv := kmstest.New(t)
	blob := srv.Encrypt(srv.CreateKey("a"), []byte("x"), "")
	a := send(t, transport(t, srv), hand{region: "ap-beijing", action: "Decrypt", body: `{"CiphertextBlob":"` + blob + `"}`}.request(t, srv))
	if a.Response.Error.Code != "ResourceUnavailable.CmkNotFound" {
		t.Errorf("got %s", a.body)
	}
}

func TestCreateKeyRefusals(t *testing.T) {
	srv := kmstest.New(t, func(o *kmstest.Options) { o.KeyLimit = 2 })
	tr := transport(t, srv)
	srv.CreateKey("taken")
	for _, test := range [][2]string{
		{`{"Alias":"taken"}`, "InvalidParameterValue.AliasAlreadyExists"},
		{`{"Alias":""}`, "InvalidParameterValue.InvalidAlias"},
		{`{"Alias":"kms-x"}`, "InvalidParameterValue.InvalidAlias"},
		{`{"Alias":"-x"}`, "InvalidParameterValue.InvalidAlias"},
		{`{"Alias":"x","KeyUsage":"FLY"}`, "InvalidParameterValue.InvalidKeyUsage"},
		{`{"Alias":"x","KeyUsage":"ASYMMETRIC_DECRYPT_SM2"}`, "UnsupportedOperation.UnsupportedKeyUsageInCurrentRegion"},
		{`{"Alias":"x","Type":3}`, "InvalidParameterValue.InvalidType"},
		{`{"Alias":"x","Type":2}`, ""}, // waits for its material
		{`{"Alias":"y"}`, "LimitExceeded.CmkLimitExceeded"},
	} {
		a := send(t, tr, hand{action: "CreateKey", body: test[0]}.request(t, srv))
		if a.Response.Error.Code != test[1] {
			t.Errorf("%s: %q, want %q", test[0], a.Response.Error.Code, test[1])
		}
	}
	if _, err := sdkEncrypt(newSDK(t, srv, srv.Credential()), srv.KeyID("x"), "", []byte("x")); sdkCode(err) != "ResourceUnavailable.CmkDisabled" {
		t.Errorf("encrypted with a key that has no material: %v", err)
	}
	if again := srv.CreateKey("taken"); again != srv.KeyID("taken") {
		t.Error("the same alias made another key")
	}
}

func TestListingsAndTheRest(t *testing.T) {
	srv := kmstest.New(t)
	c := newSDK(t, srv, srv.Credential())
	var ids []string
	for _, alias := range []string{"a", "b", "c", "d"} {
		ids = append(ids, srv.CreateKey(alias))
	}
	srv.Disable(ids[1])
	srv.ScheduleDeletion(ids[2])

	list := kms.NewListKeysRequest()
	list.Limit = common.Uint64Ptr(2)
	list.Offset = common.Uint64Ptr(1)
	got := must[*kms.ListKeysResponse](t)(c.ListKeys(list)).Response
	var listed []string
	for _, k := range got.Keys {
		listed = append(listed, *k.KeyId)
	}
	if *got.TotalCount != 3 || !slices.Equal(listed, []string{ids[1], ids[3]}) {
		t.Errorf("ListKeys: %d in all, %v", *got.TotalCount, listed)
	}

	detail := kms.NewListKeyDetailRequest()
	detail.KeyState = common.Uint64Ptr(3)
	details := must[*kms.ListKeyDetailResponse](t)(c.ListKeyDetail(detail)).Response
	if *details.TotalCount != 1 || *details.KeyMetadatas[0].KeyId != ids[2] {
		t.Errorf("ListKeyDetail: %d in all", *details.TotalCount)
	}

	several := kms.NewDescribeKeysRequest()
	several.KeyIds = common.StringPtrs(ids)
	described := must[*kms.DescribeKeysResponse](t)(c.DescribeKeys(several)).Response.KeyMetadatas
	if len(described) != 4 || *described[1].KeyState != "Disabled" {
		t.Errorf("DescribeKeys: %d", len(described))
	}
	several = kms.NewDescribeKeysRequest()
	several.KeyIds = common.StringPtrs([]string{ids[0], ids[0]})
	if _, err := c.DescribeKeys(several); sdkCode(err) != "InvalidParameterValue.DuplicatedKeyId" {
		t.Errorf("DescribeKeys twice the same: %v", err)
	}

	random := kms.NewGenerateRandomRequest()
	random.NumberOfBytes = common.Uint64Ptr(1024)
	text := *must[*kms.GenerateRandomResponse](t)(c.GenerateRandom(random)).Response.Plaintext
	if b := must[[]byte](t)(base64.StdEncoding.DecodeString(text)); len(b) != 1024 {
		t.Errorf("GenerateRandom: %d bytes", len(b))
	}

	status := must[*kms.GetServiceStatusResponse](t)(c.GetServiceStatus(kms.NewGetServiceStatusRequest())).Response
	if !*status.ServiceEnabled || *status.InvalidType != 1 || *status.CmkUserCount != 4 {
		t.Errorf("GetServiceStatus: %+v", status)
	}

	rotate := func() string {
		q := kms.NewRotateKeyRequest()
		q.KeyId = &ids[0]
		_, err := c.RotateKey(q)
		return sdkCode(err)
	}
	if first, second := rotate(), rotate(); first != "" || second != "RequestLimitExceeded.RotateRateLimited" {
		t.Errorf("RotateKey: %q, then %q", first, second)
	}
	for spec, size := range map[string]int{"AES_128": 16, "AES_256": 32, "": 77} {
		q := kms.NewGenerateDataKeyRequest()
		q.KeyId, q.KeySpec = &ids[0], &spec
		if spec == "" {
			q.NumberOfBytes = common.Uint64Ptr(77)
		}
		r := must[*kms.GenerateDataKeyResponse](t)(c.GenerateDataKey(q)).Response
		_, plaintext, err := sdkDecrypt(c, *r.CiphertextBlob, "")
		if err != nil || len(plaintext) != size || base64.StdEncoding.EncodeToString(plaintext) != *r.Plaintext {
			t.Errorf("GenerateDataKey %s: %d bytes: %v", spec, len(plaintext), err)
		}
	}
}
