//! What a process, a device and a machine hold in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use burn::tensor::Device;

use crate::memory::kilobytes;

/// Memory of this process that is in RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessMemory {
    /// Bytes that are resident now.
    pub resident: usize,
    /// Most bytes that were resident since the start of the process, or since [`reset_peak_memory`]. Only Linux knows it
    /// at all times; elsewhere it is the most that [`process_memory`] saw: see [`MemoryWatch`].
    pub peak: usize,
}

/// What the operating system counts for this process; none where this is not known how to ask (Linux, macOS and Windows are).
pub fn process_memory() -> Option<ProcessMemory> {
    system::process_memory()
}

/// Lets the peak begin anew at what is resident now; returns whether the system did.
pub fn reset_peak_memory() -> bool {
    system::reset_peak_memory()
}

/// Bytes of RAM of this machine; none where this is not known how to ask (only Linux is).
pub(super) fn machine_memory() -> Option<usize> {
    kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

#[cfg(not(any(target_os = "macos", target_os = "windows")))]
mod system {
    use super::ProcessMemory;
    use crate::memory::kilobytes;

    pub fn process_memory() -> Option<ProcessMemory> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        Some(ProcessMemory { resident: kilobytes(&status, "VmRSS:")?, peak: kilobytes(&status, "VmHWM:")? })
    }

    pub fn reset_peak_memory() -> bool {
        std::fs::write("/proc/self/clear_refs", "5").is_ok()
    }
}

#[cfg(any(target_os = "macos", target_os = "windows"))]
mod system {
    use super::{ProcessMemory, SeenPeak};

    static PEAK: SeenPeak = SeenPeak::new();

    pub fn process_memory() -> Option<ProcessMemory> {
        Some(PEAK.see(memory_stats::memory_stats()?.physical_mem))
    }

    pub fn reset_peak_memory() -> bool {
        memory_stats::memory_stats().is_some_and(|now| PEAK.reset(now.physical_mem))
    }
}

/// The peak of what was seen, for systems that do not keep one or do not let it begin anew.
#[cfg(any(test, target_os = "macos", target_os = "windows"))]
struct SeenPeak(std::sync::atomic::AtomicUsize);

#[cfg(any(test, target_os = "macos", target_os = "windows"))]
impl SeenPeak {
    const fn new() -> Self {
        Self(std::sync::atomic::AtomicUsize::new(0))
    }

    fn see(&self, resident: usize) -> ProcessMemory {
        let peak = self.0.fetch_max(resident, Ordering::Relaxed).max(resident);
        ProcessMemory { resident, peak }
    }

    fn reset(&self, resident: usize) -> bool {
        self.0.store(resident, Ordering::Relaxed);
        true
    }
}

/// The peak between a start and an end. Where the system does not keep it, a thread looks every millisecond.
#[derive(Debug)]
pub struct MemoryWatch {
    looking: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
    /// Of the watch itself; none where the system keeps the peak.
    max: Arc<std::sync::atomic::AtomicUsize>,
}

impl MemoryWatch {
    /// Starts watching. Watches that overlap see each other's peaks where the system keeps them.
    pub fn start() -> Self {
        let max = Arc::default();
        let system_keeps_it = cfg!(not(any(target_os = "macos", target_os = "windows"))) && reset_peak_memory();
        let looking = if system_keeps_it { None } else { look(&max) };
        Self { looking, max }
    }

    /// What is resident now, and the most that was since the start; none where this is not known how to ask.
    pub fn finish(self) -> Option<ProcessMemory> {
        let now = process_memory();
        let Some((stop, thread)) = self.looking else { return now };
        stop.store(true, Ordering::Relaxed);
        thread.join().ok()?;
        let now = now?;
        Some(ProcessMemory { peak: self.max.load(Ordering::Relaxed).max(now.resident), ..now })
    }
}

/// Keeps the most that is seen in `max`, until told to stop; none if no thread is available.
fn look(max: &Arc<std::sync::atomic::AtomicUsize>) -> Option<(Arc<AtomicBool>, JoinHandle<()>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let (max, stopped) = (max.clone(), stop.clone());
    let looking = move || {
        while !stopped.load(Ordering::Relaxed) {
            let Some(now) = process_memory() else { return };
            max.fetch_max(now.resident, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    };
    Some((stop, thread::Builder::new().spawn(looking).ok()?))
}

/// What a device's allocator holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceMemory {
    /// Bytes in use.
    pub live: u64,
    /// Bytes taken from the device: those in use, padding, and pages kept for later.
    pub reserved: u64,
}

/// What the device's allocator says that it holds; none for devices without one of their own, as the CPU: there, add up
/// [`Gpt2::bytes`](crate::Gpt2::bytes) and [`KvCache::bytes`](crate::KvCache::bytes), or ask for the process's.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    let usage = device.memory_pool_usage()?;
    Some(DeviceMemory { live: usage.bytes_in_use, reserved: usage.bytes_reserved })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether this is a process in which a test of this file is alone, and no other asks for memory or gives some back; if not, it
    /// passes in one.
    #[cfg(target_os = "linux")]
    fn is_alone(test: &str) -> bool {
        const ALONE: &str = "GPT2_BURN_TEST_IS_ALONE";
        if std::env::var_os(ALONE).is_some() {
            return true;
        }
        let (_, module) = module_path!().split_once("::").unwrap();
        let mut program = std::process::Command::new(std::env::current_exe().unwrap());
        let output = program.args(["--exact", &format!("{module}::{test}")]).env(ALONE, "1").output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
        false
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_allocated_is_resident_and_stays_the_peak() {
        if !is_alone("what_is_allocated_is_resident_and_stays_the_peak") {
            return;
        }
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
        assert!(machine_memory().unwrap() > during.resident);
    }

    #[test]
    fn a_peak_that_is_seen_is_kept_until_it_begins_anew() {
        let peak = SeenPeak::new();
        assert_eq!(peak.see(5), ProcessMemory { resident: 5, peak: 5 });
        assert_eq!(peak.see(9).peak, 9);
        assert_eq!(peak.see(3), ProcessMemory { resident: 3, peak: 9 });
        assert!(peak.reset(2));
        assert_eq!(peak.see(1).peak, 2);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_looks_sees_what_is_held_for_a_while() {
        if !is_alone("a_thread_that_looks_sees_what_is_held_for_a_while") {
            return;
        }
        let max = Arc::default();
        let looking = look(&max);
        let before = process_memory().unwrap().resident;
        let held = std::hint::black_box(vec![1_u8; 48 << 20]);
        thread::sleep(Duration::from_millis(50));
        drop(std::hint::black_box(held));
        let seen = MemoryWatch { looking, max }.finish().unwrap();
        assert!(seen.peak > before + (24 << 20), "{before} {seen:?}");
    }

    #[test]
    fn lines_of_linuxs_files_are_read() {
        let text = "VmPeak:\t  10 kB\nVmRSS:\t    1234 kB\nVmHWM: 7\n";
        assert_eq!(kilobytes(text, "VmRSS:"), Some(1234 * 1024));
        assert_eq!((kilobytes(text, "VmHWM:"), kilobytes(text, "VmSwap:")), (None, None));
    }

    #[test]
    #[cfg(feature = "flex")]
    fn the_cpu_has_no_allocator_of_its_own() {
        assert_eq!(device_memory(&Device::flex()), None);
    }
}
