//! Pages, against sequences that are plain lists: whatever is shared, forked, cut and given back, each still reads its own tokens.

use std::collections::HashMap;

use gpt2_burn_core::pages::{PageCopy, PageId, PagePool, PageRow};
use proptest::prelude::*;

const PAGE: usize = 4;

/// What a step may do with pages.
#[derive(Clone, Debug)]
enum Call {
    /// Appends so many tokens to each row, of which so many count.
    Step(Vec<(usize, usize)>),
    /// The same, of which some count before others are written; what does not count keeps its pages until the next step.
    Chunks(Vec<(usize, usize)>),
    Fork(usize),
    Truncate(usize, usize),
    Release(usize),
    /// Holds the first tokens of a row on its own, as a tree does.
    Insert(usize, usize),
    /// Another row of what is held.
    Hit(usize, usize),
    Evict(usize),
}

fn calls() -> impl Strategy<Value = Call> {
    prop_oneof![
        4 => proptest::collection::vec((0_usize..7, 0_usize..7), 1..5).prop_map(Call::Step),
        3 => proptest::collection::vec((0_usize..12, 0_usize..12), 1..5).prop_map(Call::Chunks),
        2 => any::<usize>().prop_map(Call::Fork),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(row, len)| Call::Truncate(row, len)),
        1 => any::<usize>().prop_map(Call::Release),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(row, len)| Call::Insert(row, len)),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(held, len)| Call::Hit(held, len)),
        1 => any::<usize>().prop_map(Call::Evict),
    ]
}

/// A pool, what its pages hold, and what they should.
struct World {
    pool: PagePool,
    memory: HashMap<(PageId, usize), u32>,
    rows: Vec<(PageRow, Vec<u32>)>,
    held: Vec<(Vec<PageId>, Vec<u32>)>,
    next: u32,
    copied: usize,
    short: usize,
}

impl World {
    fn new(max_pages: usize) -> Self {
        Self {
            pool: PagePool::new(PAGE, max_pages),
            memory: HashMap::new(),
            rows: vec![(PageRow::default(), Vec::new())],
            held: Vec::new(),
            next: 0,
            copied: 0,
            short: 0,
        }
    }

    fn read(&self, pages: &[PageId], len: usize) -> Vec<Option<u32>> {
        (0..len).map(|at| self.memory.get(&(pages[at / PAGE], at % PAGE)).copied()).collect()
    }

    fn step(&mut self, counts: &[(usize, usize)], in_chunks: bool) {
        let mut rows: Vec<(&mut PageRow, usize)> =
            self.rows.iter_mut().enumerate().map(|(at, (row, _))| (row, counts[at % counts.len()].0)).collect();
        let before = (self.pool.used(), self.pool.available());
        let Ok(copies) = self.pool.reserve(&mut rows) else {
            assert_eq!((self.pool.used(), self.pool.available()), before, "a step is whole");
            self.short += 1;
            return;
        };
        for PageCopy { from, to, tokens } in copies {
            self.copied += 1;
            assert!(tokens > 0 && tokens < PAGE && from != to);
            for slot in 0..tokens {
                self.memory.insert((to, slot), self.memory[&(from, slot)]);
            }
        }
        // All rows write, then all commit: a row must not write where another one reads.
        for (at, (row, text)) in self.rows.iter_mut().enumerate() {
            let (new, accepted) = counts[at % counts.len()];
            for position in row.len()..row.len() + new {
                self.memory.insert((row.pages()[position / PAGE], position % PAGE), self.next);
                if position < row.len() + accepted.min(new) {
                    text.push(self.next);
                }
                self.next += 1;
            }
        }
        for (at, (row, text)) in self.rows.iter_mut().enumerate() {
            let (new, accepted) = counts[at % counts.len()];
            let accepted = accepted.min(new);
            if in_chunks {
                self.pool.advance(row, accepted / 3);
                self.pool.advance(row, accepted - accepted / 3);
            } else {
                self.pool.commit(row, accepted);
            }
            assert_eq!(row.len(), text.len());
        }
    }

    fn call(&mut self, call: &Call) {
        match call {
            Call::Step(counts) => self.step(counts, false),
            Call::Chunks(counts) => self.step(counts, true),
            Call::Fork(at) if !self.rows.is_empty() && self.rows.len() < 6 => {
                let (row, text) = &self.rows[at % self.rows.len()];
                let fork = (self.pool.fork(row), text.clone());
                self.rows.push(fork);
            }
            Call::Truncate(at, len) if !self.rows.is_empty() => {
                let at = at % self.rows.len();
                let (row, text) = &mut self.rows[at];
                let len = len % (text.len() + 1);
                self.pool.truncate(row, len);
                text.truncate(len);
            }
            Call::Release(at) if self.rows.len() > 1 => {
                let (mut row, _) = self.rows.swap_remove(at % self.rows.len());
                self.pool.release(&mut row);
            }
            Call::Insert(at, len) if !self.rows.is_empty() => {
                let (row, text) = &self.rows[at % self.rows.len()];
                let len = len % (text.len() + 1);
                let pages = row.pages()[..len.div_ceil(PAGE)].to_vec();
                self.pool.keep(&pages);
                self.held.push((pages, text[..len].to_vec()));
            }
            Call::Hit(at, len) if !self.held.is_empty() && self.rows.len() < 6 => {
                let (pages, text) = &self.held[at % self.held.len()];
                let len = len % (text.len() + 1);
                let row = (self.pool.row_of(pages, len), text[..len].to_vec());
                self.rows.push(row);
            }
            Call::Evict(at) if !self.held.is_empty() => {
                let (pages, _) = self.held.swap_remove(at % self.held.len());
                self.pool.give_up(&pages);
            }
            _ => {}
        }
    }

    fn check(&self) {
        let held: Vec<PageId> = self.held.iter().flat_map(|(pages, _)| pages.iter().copied()).collect();
        self.pool.check(self.rows.iter().map(|(row, _)| row), &held).unwrap();
        for (row, text) in &self.rows {
            assert_eq!(self.read(row.pages(), row.len()), text.iter().copied().map(Some).collect::<Vec<_>>());
        }
        for (pages, text) in &self.held {
            assert_eq!(self.read(pages, text.len()), text.iter().copied().map(Some).collect::<Vec<_>>());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(300), ..ProptestConfig::default() })]

    #[test]
    fn every_row_reads_its_own_tokens_whatever_is_shared(
        calls in proptest::collection::vec(calls(), 1..40),
        max_pages in 1_usize..40,
    ) {
        let mut world = World::new(max_pages);
        for call in &calls {
            world.call(call);
            world.check();
        }
        // All of it can be given back.
        while let Some((mut row, _)) = world.rows.pop() {
            world.pool.release(&mut row);
        }
        for (pages, _) in std::mem::take(&mut world.held) {
            world.pool.give_up(&pages);
        }
        prop_assert_eq!((world.pool.used(), world.pool.available()), (0, max_pages));
    }
}

/// The property above would hold of a pool that shares nothing: here is what happens.
#[test]
fn sharing_copies_the_tail_once_a_row_and_no_full_page() {
    let mut world = World::new(100);
    world.step(&[(10, 10)], false);
    (0..4).for_each(|_| world.call(&Call::Fork(0)));
    assert_eq!((world.pool.used(), world.copied), (3, 0));
    world.step(&[(1, 1)], false);
    world.check();
    // One of five goes on where the tokens are.
    assert_eq!((world.pool.used(), world.copied), (2 + 5, 4));
    world.step(&[(6, 2)], false);
    assert_eq!((world.pool.used(), world.copied), (2 + 5 * 2, 4), "what was rejected takes no page");
    world.check();
    // A hit on what a row holds, and goes on with.
    world.call(&Call::Insert(0, 12));
    world.step(&[(1, 1)], false);
    world.call(&Call::Hit(0, 12));
    let row = &world.rows.last().unwrap().0;
    assert_eq!((row.len(), row.pages().len()), (12, 3));
    world.check();
}

#[test]
fn a_step_that_needs_too_many_pages_takes_none_and_says_so() {
    let mut pool = PagePool::new(PAGE, 3);
    let (mut one, mut two) = (PageRow::default(), PageRow::default());
    let shortage = pool.reserve(&mut [(&mut one, 5), (&mut two, 5)]).unwrap_err();
    assert_eq!((shortage.needed, shortage.available, pool.used()), (4, 3, 0));
    assert!(shortage.to_string().contains("needs 4 pages more, and 3 are left"));
    assert!(pool.reserve(&mut [(&mut one, usize::MAX)]).is_err());
    assert!(pool.reserve(&mut [(&mut one, 5), (&mut two, 4)]).is_ok());
    // What was reserved and is not needed any more does not count again.
    assert!(pool.reserve(&mut [(&mut one, 5), (&mut two, 4)]).is_ok());
    pool.commit(&mut one, 0);
    pool.commit(&mut two, 4);
    assert_eq!((one.len(), two.len(), pool.used()), (0, 4, 1));
}

#[test]
fn what_was_written_and_does_not_count_is_known() {
    let mut pool = PagePool::new(PAGE, 9);
    let mut row = PageRow::default();
    pool.reserve(&mut [(&mut row, 6)]).unwrap();
    pool.commit(&mut row, 6);
    assert!(pool.uncommitted(&row).iter().map(|(_, from)| *from).eq([2]), "the tail");
    pool.reserve(&mut [(&mut row, 9)]).unwrap();
    let written: Vec<usize> = pool.uncommitted(&row).into_iter().map(|(_, from)| from).collect();
    assert_eq!(written, [2, 0, 0]);
    pool.release(&mut row);
    assert_eq!((row.len(), pool.used(), pool.to_string().as_str()), (0, 0, "0 pages, 0 of them shared"));
}

#[test]
#[should_panic = "is not kept"]
fn a_page_that_is_given_up_twice_is_noticed() {
    let mut pool = PagePool::new(PAGE, 9);
    let mut row = PageRow::default();
    pool.reserve(&mut [(&mut row, 1)]).unwrap();
    let pages = row.pages().to_vec();
    pool.keep(&pages);
    assert_eq!((pool.kept(), pool.idle(), pool.references(pages[0])), (1, 0, 2));
    pool.release(&mut row);
    assert_eq!((pool.kept(), pool.idle(), pool.used()), (1, 1, 1));
    pool.give_up(&pages);
    pool.give_up(&pages);
}
