package main

import (
	"fmt"
	"os"
	"text/tabwriter"
	"time"
)

const (
	pace        = 1000 // opens a second
	auditRounds = 5
)

// audited measures what records cost: at a thousand opens a second, and as fast as it
// goes, with one mount that keeps none, one that keeps them by default, and one where
// an open waits for its record.
func (s *stage) audited() error {
	settings := []struct{ name, table string }{
		{"off", "journal = false\n"},
		{"on", "journal = false\nfile = %q\n"},
		{"required", "journal = false\nfile = %q\nrequired = true\n"},
	}
	var mounts []string
	for _, a := range settings {
		mnt, err := s.mountKMSFS("audit-"+a.name, "1h", a.table)
		if err != nil {
			return err
		}
		if _, err := readEach(mnt); err != nil { // all is decrypted before
			return err
		}
		mounts = append(mounts, mnt)
	}
	measures := []struct {
		name string
		run  func(dir string) (perSecond float64, median time.Duration, err error)
	}{
		{fmt.Sprintf("%d opens a second wanted", pace), paced},
		{"as fast as it goes, 1 reader", func(d string) (float64, time.Duration, error) { return closedLoop(d, 1, 3000) }},
		{"as fast as it goes, 8 readers", func(d string) (float64, time.Duration, error) { return closedLoop(d, 8, 1000) }},
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "audit: opens a second (median of each)\toff\ton\trequired\ton / off\trequired / off")
	for _, m := range measures {
		rates, medians := make([][]time.Duration, len(mounts)), make([][]time.Duration, len(mounts))
		for range auditRounds { // interleaved, so that all see the same machine
			for i, mnt := range mounts {
				perSecond, med, err := m.run(mnt)
				if err != nil {
					return fmt.Errorf("audit %s: %w", settings[i].name, err)
				}
				rates[i] = append(rates[i], time.Duration(float64(time.Second)/perSecond))
				medians[i] = append(medians[i], med)
			}
		}
		fmt.Fprint(w, m.name)
		each := make([]float64, len(mounts))
		for i := range mounts {
			each[i] = float64(time.Second) / float64(median(rates[i]))
			fmt.Fprintf(w, "\t%.0f (%.1f us)", each[i], float64(median(medians[i]).Nanoseconds())/1e3)
		}
		fmt.Fprintf(w, "\t%.3f\t%.3f\n", each[1]/each[0], each[2]/each[0])
	}
	fmt.Fprintln(w)
	return w.Flush()
}

// paced opens one file after the other at a fixed rate for a second. Who falls behind
// catches up as fast as it can, and shows in the rate when it cannot.
func paced(dir string) (perSecond float64, med time.Duration, err error) {
	buf := make([]byte, 2*size)
	took := make([]time.Duration, 0, pace)
	begun := time.Now()
	for i := range pace {
		time.Sleep(time.Until(begun.Add(time.Duration(i) * time.Second / pace)))
		start := time.Now()
		if err := readOne(file(dir, i), buf); err != nil {
			return 0, 0, err
		}
		took = append(took, time.Since(start))
	}
	all := time.Since(begun) + time.Second/pace
	return pace / all.Seconds(), median(took), nil
}

// closedLoop opens files on n threads, each the next file as soon as it has closed one.
func closedLoop(dir string, n, times int) (perSecond float64, med time.Duration, err error) {
	begun := time.Now()
	took, err := readers(n, times, func(reader, i int) string { return file(dir, reader*times+i) })
	if err != nil {
		return 0, 0, err
	}
	return float64(n*times) / time.Since(begun).Seconds(), median(took), nil
}
