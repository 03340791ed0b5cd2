//! The requests, and when they arrive: the same for every engine that is measured.

use rand_mt::Mt;

/// A request.
pub struct Job {
    /// Seconds from the start to its arrival.
    pub arrival: f64,
    pub prompt: Vec<u32>,
    pub new_tokens: usize,
}

/// From so many to so many, both included.
#[derive(Clone, Copy, Debug)]
pub struct LengthRange {
    pub min: usize,
    pub max: usize,
}

impl std::str::FromStr for LengthRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.parse::<usize>().map_err(|error| format!("`{text}`: {error}"));
        match (number(min)?, number(max)?) {
            (0, _) => Err("at least 1".to_owned()),
            (min, max) if min > max => Err(format!("{min} is more than {max}")),
            (min, max) => Ok(Self { min, max }),
        }
    }
}

impl std::fmt::Display for LengthRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.min, self.max)
    }
}

/// What is drawn.
pub struct Work {
    pub requests: usize,
    /// Arrivals a second, a Poisson process; 0: all at once.
    pub rate: f64,
    pub prompt: LengthRange,
    pub new: LengthRange,
    /// Tokens that all prompts begin with.
    pub shared: usize,
    pub seed: u64,
    pub vocab_size: usize,
}

impl Work {
    /// The requests in the order of their arrival, as Python draws them with `random.Random(seed)`: `randrange`, `randint` and
    /// `expovariate`, in this order. So a script of a few lines gives another engine the same ones.
    pub fn jobs(&self) -> Vec<Job> {
        let mut python = Python::new(self.seed);
        // GPT-2's last token ends a text.
        let ids = self.vocab_size.saturating_sub(1).max(1);
        let shared: Vec<u32> = (0..self.shared).map(|_| python.below(ids) as u32).collect();
        let mut arrival = 0.0;
        let mut job = |_| {
            if self.rate > 0.0 {
                arrival += -(1.0 - python.uniform()).ln() / self.rate;
            }
            let length = python.within(self.prompt);
            let own = (0..length).map(|_| python.below(ids) as u32);
            let prompt = shared.iter().copied().chain(own).collect();
            Job { arrival, prompt, new_tokens: python.within(self.new) }
        };
        (0..self.requests).map(&mut job).collect()
    }
}

/// CPython's random numbers: the Mersenne Twister (Matsumoto and Nishimura, 1998), and what its `random` module makes of it.
struct Python(Mt);

impl Python {
    fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        Self(if high == 0 { Mt::new_with_key([low]) } else { Mt::new_with_key([low, high]) })
    }

    /// `random()`: 53 bits in [0, 1).
    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// `randrange(n)`, of up to 32 bits: bits are drawn until they are less.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.0.next_u32() >> (32 - bits.min(32))) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `randint(min, max)`.
    fn within(&mut self, span: LengthRange) -> usize {
        span.min + self.below(span.max - span.min + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `random.Random(1)`: five times `randrange(50256)`, then `randint(16, 384)`, then `expovariate(2.0)`; of CPython 3.
    #[test]
    fn numbers_are_those_of_python() {
        let mut python = Python::new(1);
        let drawn: Vec<usize> = (0..5).map(|_| python.below(50_256)).collect();
        assert_eq!(drawn, [8805, 37303, 50054, 4135, 16716]);
        assert_eq!(python.within(LengthRange { min: 16, max: 384 }), 76);
        assert!((-(1.0 - python.uniform()).ln() / 2.0 - 0.34202938982980013).abs() < 1e-15);
    }
}
