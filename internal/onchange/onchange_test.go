package onchange

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A garden is files that grow as a test wants, by path; "!" is one that cannot be looked at.
type garden struct {
	mu    sync.Mutex
	files map[string]string
}

func (g *garden) set(files ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.files == nil {
		g.files = map[string]string{}
	}
	for _, f := range files {
		p, stamp, _ := strings.Cut(f, "=")
		g.files[p] = stamp
		if stamp == "" {
			delete(g.files, p)
		}
	}
}

func (g *garden) look(p string) (Look, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if stamp, ok := g.files[p]; ok {
		if stamp == "!" {
			return Look{}, errors.New("i/o error")
		}
		return Look{Stamp: stamp}, nil
	}
	names := map[string]bool{}
	for f := range g.files {
		if rest, ok := strings.CutPrefix(f, p+"/"); ok || p == "" {
			if p == "" {
				rest = f
			}
			name, _, _ := strings.Cut(rest, "/")
			names[name] = true
		}
	}
	if len(names) == 0 && p != "" {
		return Look{}, fs.ErrNotExist
	}
	return Look{Names: append([]string{}, slices.Collect(maps.Keys(names))...)}, nil
}

// change alters files and tells the Runner of each.
func (g *garden) change(r *Runner, files ...string) {
	for _, f := range files {
		g.set(f)
		p, _, _ := strings.Cut(f, "=")
		r.Changed(p)
	}
}

func TestInventory(t *testing.T) {
	for _, c := range []struct {
		name   string
		before string
		after  string // what is set then; "x=" removes
		places string // looked at; "." is the root
		want   string
	}{
		{"nothing has changed", "a=1 d/b=1", "", "a d/b d .", ""},
		{"another content", "a=1 b=1", "a=2", "a", "a"},
		{"a new file", "a=1", "b=1", "b", "b"},
		{"a file is gone", "a=1 b=1", "b=", "b", "b"},
		{"a file came and went", "a=1", "", "tmp", ""},
		{"a new directory", "a=1", "d/e/x=1 d/y=1", "d", "d/e/x d/y"},
		{"a directory is gone", "a=1 d/e/x=1 d/y=1 dd=1", "d/e/x= d/y=", "d", "d/e/x d/y"},
		{"a file becomes a directory", "a=1", "a= a/x=1", "a", "a a/x"},
		{"a directory becomes a file", "a/x=1", "a/x= a=1", "a", "a a/x"},
		{"anything may have happened", "a=1 b=1 d/c=1", "a=2 b= d/n=1", ".", "a b d/n"},
		{"places overlap", "d/a=1", "d/a=2", "d d/a .", "d/a"},
		{"what was not told of is not looked at", "a=1 b=1", "a=2 b=2", "a", "a"},
		{"drafts", "a=1", ".kmsfs-ABCDEFGHIJKLMNOPQRSTUVWXYZ=1 .a.swp=1 a~=1 .#a=1 #a#=1", ".", ""},
		{"no drafts", "x=1", ".kmsfs-a=1 .swp=1 a~b=1 #a=1", ".", "#a .kmsfs-a .swp a~b"},
		{"nothing is known", "a=1 b=1", "a=! b=2", ".", "b"},
		{"nothing is known of what is below", "d/a=1 b=1", "d/a= d=! b=2", ".", "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &garden{}
			g.set(strings.Fields(c.before)...)
			all := take(g.look)
			g.set(strings.Fields(c.after)...)
			var places []string
			for _, p := range strings.Fields(c.places) {
				places = append(places, strings.TrimPrefix(p, "."))
				if p != "." {
					places[len(places)-1] = p
				}
			}
			if got := all.compare(g.look, places); !slices.Equal(got, strings.Fields(c.want)) {
				t.Errorf("changed: %q, want %q", got, c.want)
			}
			if again := all.compare(g.look, places); len(again) > 0 {
				t.Errorf("and again: %q", again)
			}
		})
	}
}

// A trial is a Runner in a bubble of time whose command is a function.
type trial struct {
	garden
	*Runner
	begun time.Time
	runs  []string // when, and what had changed
	fails func(n int) error
}

func tried(t *testing.T, test func(tr *trial)) {
	synctest.Test(t, func(t *testing.T) {
		tr := &trial{begun: time.Now()}
		tr.set("a=1", "b=1", "d/c=1")
		tr.Runner = New(Options{Look: tr.look, Log: slog.New(slog.DiscardHandler)})
		tr.do = func(_ context.Context, _, changed []string) error {
			tr.runs = append(tr.runs, time.Since(tr.begun).String()+" "+strings.Join(changed, " "))
			if tr.fails != nil {
				return tr.fails(len(tr.runs))
			}
			return nil
		}
		tr.Start([]string{"reload"})
		test(tr)
		tr.Stop()
		tr.Wait()
	})
}

// ran compares all that was run within the next while.
func (tr *trial) ran(t *testing.T, while time.Duration, want ...string) {
	t.Helper()
	time.Sleep(while)
	synctest.Wait()
	if !slices.Equal(tr.runs, want) {
		t.Errorf("ran %q, want %q", tr.runs, want)
	}
}

func TestOnceForABurst(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.ran(t, time.Hour)
		tr.begun = time.Now()
		for i := range 20 {
			tr.change(tr.Runner, "n"+string(rune('a'+i))+"=1")
			time.Sleep(100 * time.Millisecond)
		}
		tr.change(tr.Runner, "a=2", "b=")
		tr.ran(t, time.Hour, "2.5s a b na nb nc nd ne nf ng nh ni nj nk nl nm nn no np nq nr ns nt")
	})
}

// TestNoRestForLong: who changes all the time is not waited for.
func TestNoRestForLong(t *testing.T) {
	tried(t, func(tr *trial) {
		for i := range 80 {
			tr.change(tr.Runner, "a="+strings.Repeat("x", i+2))
			time.Sleep(100 * time.Millisecond)
		}
		tr.ran(t, time.Hour, "5s a", "8.4s a")
	})
}

// TestNoRealChange: where the content is the same, nothing is run.
func TestNoRealChange(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.Changed("a")
		tr.Changed("")
		tr.Changed("none")
		tr.ran(t, time.Hour)
	})
}

func TestChangesDuringARun(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.fails = func(n int) error {
			if n == 1 {
				tr.change(tr.Runner, "b=2")
				time.Sleep(10 * time.Second) // runs
				tr.change(tr.Runner, "d/c=2", "b=3")
				time.Sleep(10 * time.Second)
			}
			return nil
		}
		tr.change(tr.Runner, "a=2")
		tr.ran(t, time.Hour, "500ms a", "21s b d/c")
	})
}

// TestAttempts: a failed run is repeated, later each time, and given up; what it was about
// is part of the next one.
func TestAttempts(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.fails = func(n int) error {
			if n <= 10 {
				return errors.New("exit status 1")
			}
			return nil
		}
		tr.change(tr.Runner, "a=2")
		tr.ran(t, 2*time.Second, "500ms a", "1.5s a")
		if s := tr.State(); s.Attempts != 2 || s.Failure != "exit status 1" || s.Pending != 1 || s.GaveUp || s.Next.Sub(tr.begun) != 6500*time.Millisecond {
			t.Errorf("%+v", s)
		}
		tr.Changed("b") // no real change, and no reason to try earlier
		want := []string{"500ms a", "1.5s a", "6.5s a", "36.5s a", "1m36.5s a", "2m36.5s a", "3m36.5s a", "4m36.5s a", "5m36.5s a", "6m36.5s a"}
		tr.ran(t, 10*time.Hour, want...)
		if s := tr.State(); !s.GaveUp || s.Attempts != 10 || s.Failures != 10 || !s.Next.IsZero() || s.Pending != 1 {
			t.Errorf("%+v", s)
		}
		tr.change(tr.Runner, "b=2")
		tr.ran(t, time.Hour, append(want, "10h0m2.5s a b")...)
		if s := tr.State(); s.GaveUp || s.Attempts != 0 || s.Failure != "" || s.Pending != 0 || s.Runs != 11 {
			t.Errorf("%+v", s)
		}
	})
}

// TestChangeWhileFailing begins the attempts anew.
func TestChangeWhileFailing(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.fails = func(n int) error {
			if n < 5 {
				return errors.New("exit status 1")
			}
			return nil
		}
		tr.change(tr.Runner, "a=2")
		tr.ran(t, 10*time.Second, "500ms a", "1.5s a", "6.5s a")
		tr.change(tr.Runner, "b=2")
		tr.ran(t, time.Hour, "500ms a", "1.5s a", "6.5s a", "10.5s a b", "11.5s a b")
	})
}

// TestAnotherCommand is tried at once by those who wait for another attempt.
func TestAnotherCommand(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.fails = func(n int) error {
			if tr.State().Command[0] == "reload" {
				return errors.New("exit status 1")
			}
			return nil
		}
		tr.change(tr.Runner, "a=2")
		tr.ran(t, 10*time.Second, "500ms a", "1.5s a", "6.5s a")
		tr.SetCommand([]string{"restart"})
		tr.ran(t, time.Hour, "500ms a", "1.5s a", "6.5s a", "10s a")
	})
}

// TestNoCommand: what changes while there is none is nobody's business later.
func TestNoCommand(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.SetCommand(nil)
		tr.change(tr.Runner, "a=2")
		time.Sleep(time.Minute)
		tr.SetCommand([]string{"reload"})
		tr.Changed("a")
		tr.ran(t, time.Hour)
		tr.change(tr.Runner, "b=2")
		tr.ran(t, time.Minute, "1h1m0.5s b")
	})
}

// TestNoCommandDuringARun: what a run has seen is not remembered when nobody wants to know it
// any more, not even when somebody wants to know again what there is now.
func TestNoCommandDuringARun(t *testing.T) {
	for name, next := range map[string][]string{"none": nil, "another": {"restart"}} {
		t.Run(name, func(t *testing.T) {
			g := &garden{}
			g.set("a=1", "b=1")
			o := Options{Look: g.look, Memory: filepath.Join(t.TempDir(), "memory"), Log: slog.New(slog.DiscardHandler)}
			var runs []string
			life := func(during func(r *Runner)) {
				synctest.Test(t, func(t *testing.T) {
					r := New(o)
					r.do = func(_ context.Context, _, changed []string) error {
						runs = append(runs, strings.Join(changed, " "))
						during(r)
						return nil
					}
					r.Start([]string{"reload"})
					g.change(r, "a=2")
					time.Sleep(time.Minute)
					r.Stop()
					r.Wait()
				})
			}
			life(func(r *Runner) {
				r.SetCommand(nil)
				g.change(r, "b=2")
				r.SetCommand(next)
			})
			life(func(*Runner) {})
			if !slices.Equal(runs, []string{"a"}) {
				t.Errorf("ran about %q, want a alone", runs)
			}
		})
	}
}

// TestStop: nothing is started any more.
func TestStop(t *testing.T) {
	tried(t, func(tr *trial) {
		tr.change(tr.Runner, "a=2")
		time.Sleep(400 * time.Millisecond)
		tr.Stop()
		tr.Wait()
		tr.ran(t, time.Hour)
	})
	g := &garden{}
	r := New(Options{Look: g.look, Log: slog.New(slog.DiscardHandler)})
	r.SetCommand([]string{"reload"})
	g.change(r, "a=1")
	r.catchUp()
	r.Stop() // while it has decided to run
	if command, changed := r.due(); command != nil {
		t.Errorf("%q is run about %q", command, changed)
	}
	New(Options{Look: (&garden{}).look}).Wait() // never started: nothing to wait for
}

// TestSuccessor: a Runner that finds a memory compares with that: what changed while none
// was there, and what no run that succeeded was about, is made up for.
func TestSuccessor(t *testing.T) {
	g := &garden{}
	odd := "odd \xff\n"
	g.set("a=1", "b=1", odd+"=1")
	o := Options{Look: g.look, Memory: filepath.Join(t.TempDir(), "memory"), Log: slog.New(slog.DiscardHandler)}
	life := func(fails error, changes ...string) (runs []string) {
		synctest.Test(t, func(t *testing.T) {
			r := New(o)
			r.do = func(_ context.Context, _, changed []string) error {
				runs = append(runs, strings.Join(changed, " "))
				return fails
			}
			r.Start([]string{"reload"})
			g.change(r, changes...)
			time.Sleep(900 * time.Millisecond)
			r.Stop()
			r.Wait()
		})
		return runs
	}
	check := func(got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("ran %q, want %q", got, want)
		}
	}
	check(life(nil))
	check(life(nil))
	g.set("a=2", odd+"=2")
	check(life(nil), "a "+odd)
	check(life(nil))
	check(life(errors.New("exit status 1"), "b=2"), "b")
	check(life(nil), "b")
	check(life(nil))
	if err := replaceFile(o.Memory, []byte(memoryVersion+"\n[\"YQ==\",\"MQ==\"]\n")); err != nil { // not whole
		t.Fatal(err)
	}
	check(life(nil))
	g.set("a=3")
	r := New(o)
	r.Forget()
	check(life(nil))
	left, err := filepath.Glob(path.Join(path.Dir(o.Memory), ".*"))
	if len(left) > 0 || err != nil {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
