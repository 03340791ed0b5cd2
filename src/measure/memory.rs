//! What a process holds in memory.

/// Memory of this process that is in RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessMemory {
    /// Bytes that are resident now.
    pub resident: usize,
    /// Most bytes that were resident since the start of the process, or since [`reset_peak_memory`].
    pub peak: usize,
}

/// What the operating system counts for this process; none where this is not known how to ask (only Linux is).
pub fn process_memory() -> Option<ProcessMemory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = |field: &str| -> Option<usize> {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(ProcessMemory { resident: kilobytes("VmRSS:")? * 1024, peak: kilobytes("VmHWM:")? * 1024 })
}

/// Lets the peak begin anew at what is resident now; returns whether the system did.
pub fn reset_peak_memory() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_is_resident_and_stays_the_peak() {
        let before = process_memory().unwrap();
        let held = std::hint::black_box(vec![1_u8; 64 << 20]);
        let during = process_memory().unwrap();
        assert!(during.resident > before.resident + (50 << 20), "{before:?} {during:?}");
        drop(std::hint::black_box(held));
        let after = process_memory().unwrap();
        // The system counts in portions.
        assert!(after.peak + (8 << 20) > during.resident, "{during:?} {after:?}");
        if reset_peak_memory() {
            assert!(process_memory().unwrap().peak + (32 << 20) < after.peak);
        }
    }
}
