package hsm

import "kmsfs/hsm/internal/worker"

// WorkerVerb is the first argument of a process that must call [WorkerMain].
const WorkerVerb = "hsm-worker"

// WorkerMain is the life of the worker process; it returns its exit code. The
// program re-executes itself with [WorkerVerb] as its first argument, and must
// then call this before it does anything else.
func WorkerMain() int { return worker.Main() }
