package kmstest

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// fields is a JSON object of a response.
type fields map[string]any

// action is one API action: it decodes its parameters and does its work.
type action func(c *call, body []byte) (fields, error)

// with makes an action of a function whose parameters are the fields of P,
// named as in the API. Those tagged `api:"required"` must be present.
func with[P any](run func(*call, P) (fields, error)) action {
	return func(c *call, body []byte) (fields, error) {
		var params P
		if err := decodeParams(body, &params); err != nil {
			return nil, err
		}
		return run(c, params)
	}
}

func decodeParams(body []byte, into any) error {
	var given map[string]json.RawMessage
	if err := json.Unmarshal(body, &given); err != nil || given == nil {
		return refuse(codeInvalidParameter, "The request body is not a JSON object.")
	}
	known := reflect.TypeOf(into).Elem()
	for name := range given {
		if _, ok := known.FieldByName(name); !ok {
			return refuse(codeUnknownParameter, "The parameter `%s` is not recognized.", name)
		}
	}
	for field := range known.Fields() {
		value, ok := given[field.Name]
		if field.Tag.Get("api") == "required" && (!ok || bytes.Equal(value, []byte("null"))) {
			return refuse(codeMissingParameter, "The request is missing a required parameter `%s`.", field.Name)
		}
	}
	if err := json.Unmarshal(body, into); err != nil {
		return refuse(codeInvalidParameter, "A parameter does not have the type it must have.")
	}
	return nil
}

// None of these are emulated, but clients may send them.
type (
	tag struct{ TagKey, TagValue string }
	// memberAccount chooses among the accounts of an organisation.
	memberAccount struct {
		MemberUin   uint64
		MemberAppId uint64 //lint:ignore ST1003 as the API spells it
	}
)
