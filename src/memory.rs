//! [`MemoryLimit`]: how many bytes may be asked for. They are reckoned before they are, since memory that is not there ends a
//! process, and not a request.

use crate::backends::{is_asynchronous, largest_buffer};
use crate::{Error, Result};
use burn::tensor::Device;

/// The part of what the system has that one request, cache or forward may take, in quarters: what is reckoned leaves out what
/// an allocator loses.
const QUARTERS: usize = 3;

/// So little is asked for without asking the system, which takes longer than a step of a small model.
const LITTLE: usize = 64 << 20;

/// How many bytes a request, a cache or a forward may take beside the weights.
///
/// ```
/// use gpt2_burn::generate::{GenerateRequest, Generator};
/// use gpt2_burn::{Error, Gpt2Config, MemoryLimit};
///
/// let device = gpt2_burn::device("flex")?;
/// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
/// let generator = Generator::new(config.init(&device)?).with_memory_limit(MemoryLimit::bytes(1 << 20));
/// let request = GenerateRequest { num_samples: 1_000_000, ..GenerateRequest::new([vec![3, 1, 4]]) };
/// let Err(Error::OutOfMemory { bytes, limit, .. }) = generator.complete(&request) else { panic!("it is refused") };
/// assert!(bytes > limit && limit == 1 << 20);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimit {
    /// None: a part of what the system has.
    bytes: Option<usize>,
}

impl MemoryLimit {
    /// So many bytes.
    pub const fn bytes(bytes: usize) -> Self {
        Self { bytes: Some(bytes) }
    }

    /// Three quarters of the memory that the system has left for this process when something is asked for: see
    /// [`available_memory`]; up to 64 MB are always granted. What several ask for at once is not added up. No limit where it
    /// is not known what the system has left, nor for what a GPU holds, which mostly has memory of its own. The default.
    pub const fn system() -> Self {
        Self { bytes: None }
    }

    /// Bytes that may be asked for now; none: any number.
    pub fn get(self) -> Option<usize> {
        self.bytes.or_else(|| Some(available_memory()? / 4 * QUARTERS))
    }

    /// Whether it is what the system has.
    pub(crate) fn is_system(self) -> bool {
        self.bytes.is_none()
    }

    /// As [`check`](Self::check), of bytes on the host and on a device.
    pub(crate) fn check_on(self, device: &Device, what: &'static str, host: usize, on_device: usize) -> Result<()> {
        // A GPU has memory of its own, about which the system knows nothing.
        let is_elsewhere = self.is_system() && is_asynchronous(device) && on_device <= isize::MAX as usize;
        self.check(what, if is_elsewhere { host } else { host.saturating_add(on_device) })
    }

    /// Checks that what grows little by little may grow from so many bytes to so many.
    pub(crate) fn check_growth(self, what: &'static str, from: usize, to: usize) -> Result<()> {
        match self.bytes {
            Some(_) => self.check(what, to),
            None if to <= LITTLE => Ok(()),
            // What is little each time is not in the end: the system is asked each time.
            None => self.check(what, to.saturating_sub(from).max(LITTLE + 1)),
        }
    }

    /// How many of these bytes may be asked for before they are needed, beside so many that are: no more than the system has, if that is
    /// known, or few.
    pub(crate) fn at_most(self, needed: usize, bytes: usize) -> usize {
        let bytes = self.bytes.map_or(bytes, |limit| bytes.min(limit.saturating_sub(needed)));
        if bytes <= LITTLE { bytes } else { bytes.min(Self::system().get().unwrap_or(LITTLE)) }
    }

    /// Checks that so many bytes may be asked for `what`; `usize::MAX` stands for more than can be counted.
    pub(crate) fn check(self, what: &'static str, bytes: usize) -> Result<()> {
        let refused = |limit| Err(Error::OutOfMemory { what, bytes, limit });
        match self.bytes {
            // What an address can reach.
            _ if bytes > isize::MAX as usize => refused(self.get().unwrap_or(isize::MAX as usize)),
            Some(limit) if bytes > limit => refused(limit),
            Some(_) => Ok(()),
            None if bytes <= LITTLE => Ok(()),
            None => match self.get() {
                Some(limit) if bytes > limit => refused(limit),
                _ => Ok(()),
            },
        }
    }
}

/// The product of some sizes; `usize::MAX` if that is more than can be counted.
pub(crate) fn product<const N: usize>(sizes: [usize; N]) -> usize {
    // A size of 0 makes nothing of all others.
    if sizes.contains(&0) { 0 } else { sizes.into_iter().fold(1, usize::saturating_mul) }
}

/// The sum of some sizes; `usize::MAX` if that is more than can be counted.
pub(crate) fn sum<const N: usize>(sizes: [usize; N]) -> usize {
    sizes.into_iter().fold(0, usize::saturating_add)
}

/// Checks that the device can read so many bytes of `what` as one buffer.
pub(crate) fn check_buffer(what: &'static str, bytes: usize, device: &Device) -> Result<()> {
    match largest_buffer(device).filter(|largest| *largest < bytes) {
        Some(largest) => {
            let expected = format!("at most {largest} bytes (the device's largest buffer)");
            Err(Error::mismatch(what, expected, bytes))
        }
        None => Ok(()),
    }
}

/// Bytes of memory that this process can still get: what the system can give without swapping, within what its control groups
/// leave. None where this is not known how to ask (only Linux is).
pub fn available_memory() -> Option<usize> {
    let of_system = kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_groups = groups.lines().filter_map(|line| left_in_group(line, &|path| std::fs::read_to_string(path).ok()));
    Some(of_groups.fold(of_system, usize::min))
}

/// Bytes in a line of one of Linux's files.
pub(crate) fn kilobytes(text: &str, field: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Bytes that a control group and those around it leave, of a line of `/proc/self/cgroup`: `0::/path` of version 2,
/// `4:memory:/path` of version 1. A container sees its own group as the root of all. None if there is no limit.
fn left_in_group(line: &str, read: &impl Fn(&str) -> Option<String>) -> Option<usize> {
    let (_, group) = line.split_once(':')?;
    let (controllers, path) = group.split_once(':')?;
    let (root, [limit, used], reclaimable) = match controllers {
        "" => ("/sys/fs/cgroup", ["memory.max", "memory.current"], "inactive_file "),
        _ if controllers.split(',').any(|controller| controller == "memory") => {
            ("/sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes"], "total_inactive_file ")
        }
        _ => return None,
    };
    let left = |folder: &str| {
        let number = |file: &str| read(&format!("{folder}/{file}"))?.trim().parse::<usize>().ok();
        let limit = number(limit)?;
        // Files that were read and not used since count as used, and go as soon as something else is wanted.
        let stat = read(&format!("{folder}/memory.stat")).unwrap_or_default();
        let files = stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse::<usize>().ok());
        let used = number(used).unwrap_or(0).saturating_sub(files.unwrap_or(0));
        Some(limit.saturating_sub(used))
    };
    let ends = path.char_indices().filter(|(_, c)| *c == '/').map(|(end, _)| end).chain([path.len()]);
    ends.filter_map(|end| left(&format!("{root}{}", &path[..end]))).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_counted_is_refused_whatever_the_limit() {
        for limit in [MemoryLimit::system(), MemoryLimit::bytes(usize::MAX)] {
            let bytes = product([usize::MAX / 2, 3, 5]);
            assert_eq!(bytes, usize::MAX);
            assert!(matches!(limit.check("rows", bytes), Err(Error::OutOfMemory { bytes: usize::MAX, .. })));
            limit.check("rows", product([0, usize::MAX, usize::MAX])).unwrap();
        }
        assert_eq!(sum([usize::MAX, 1]), usize::MAX);
    }

    #[test]
    fn a_limit_of_ones_own_stands_before_the_systems() {
        let limit = MemoryLimit::bytes(1000);
        limit.check("rows", 1000).unwrap();
        let refused = limit.check("rows", 1001).unwrap_err().to_string();
        assert!(refused.contains("rows") && refused.contains("1001") && refused.contains("1000"), "{refused}");
        MemoryLimit::bytes(usize::MAX).check("rows", 1 << 50).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_system_does_not_give_more_than_it_has() {
        let available = available_memory().unwrap();
        assert!(available > 0);
        assert!(MemoryLimit::system().check("rows", available.saturating_mul(2)).is_err());
        assert!(MemoryLimit::system().get().unwrap() < available * 2);
    }

    #[test]
    fn a_control_group_leaves_its_limit_less_what_is_used() {
        let read = |path: &str| {
            let text = match path {
                "/sys/fs/cgroup/memory.max" => "max\n",
                "/sys/fs/cgroup/a/memory.max" | "/sys/fs/cgroup/memory/a/memory.limit_in_bytes" => "1000\n",
                "/sys/fs/cgroup/a/memory.current" | "/sys/fs/cgroup/memory/a/memory.usage_in_bytes" => "700\n",
                "/sys/fs/cgroup/a/memory.stat" => "anon 5\ninactive_file 100\n",
                "/sys/fs/cgroup/memory/a/memory.stat" => "inactive_file 3\ntotal_inactive_file 200\n",
                "/sys/fs/cgroup/a/b/memory.max" => "5000",
                _ => return None,
            };
            Some(text.to_owned())
        };
        assert_eq!(left_in_group("0::/", &read), None, "no limit");
        assert_eq!(left_in_group("0::/a", &read), Some(400));
        assert_eq!(left_in_group("0::/a/b", &read), Some(400), "the group around it is the tighter one");
        assert_eq!(left_in_group("4:memory:/a", &read), Some(500));
        assert_eq!(left_in_group("4:cpu,memory:/a", &read), Some(500));
        assert_eq!(left_in_group("3:cpu:/a", &read), None);
        assert_eq!(left_in_group("nonsense", &read), None);
    }
}
