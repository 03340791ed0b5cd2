//! Tests in a process of their own: those that count what the whole process does, beside which no other test may run.

use std::any::type_name;
use std::process::Command;

use super::skipped;

/// Set for such a process, to the test that it runs.
const ALONE: &str = "GPT2_BURN_ALONE";

/// Printed there when the work is done: a name that no test has would pass, too.
const DONE: &str = "done alone";

/// By which name the test harness knows a test: its function, or a closure in it.
pub fn name_of<T>(_: &T) -> &'static str {
    // Such as `it::memory::loading_holds_the_weights_once::{{closure}}`.
    let path = type_name::<T>();
    let path = path.split("::{{closure}}").next().unwrap_or(path);
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// Whether this process was started for one test.
pub fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// Does the work of the test in which this closure stands, in a process of its own.
pub fn alone(work: impl FnOnce()) {
    alone_with(&[], work);
}

/// The same, with more variables in that process's environment.
pub fn alone_with<W: FnOnce()>(variables: &[(&str, &str)], work: W) {
    if is_alone() {
        work();
        println!("{DONE}");
        return;
    }
    let test = name_of(&work);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .envs(variables.iter().copied())
        .env(ALONE, test)
        .output()
        .unwrap();
    let (printed, errors) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    // Captured, as what a test prints is; but what was skipped has to be seen.
    print!("{printed}");
    errors.lines().filter_map(|line| line.strip_prefix("SKIPPED: ")).for_each(skipped);
    assert!(child.status.success(), "{}: {printed}{errors}", child.status);
    assert!(printed.contains(DONE), "nothing was done alone as {test}: {printed}{errors}");
}
