//! How the tiles of a product are dealt to threads.

use rayon::prelude::*;

use crate::ops::TILE;

/// Rows of `x` between which threads can be switched, so that there is work for all where there are few tiles.
const ROW_BLOCK: usize = 120;

/// Tiles for a thread are dealt in this many portions, since threads are not equally fast.
const PORTIONS: usize = 4;

/// Rows `first..first + rows` of `x`, which are multiplied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub first: usize,
    pub rows: usize,
}

/// Splits rows into groups of at most `max`, evenly: 13 rows are 7 and 6, since few rows at a time leave multipliers idle.
pub fn split(rows: usize, max: usize) -> Vec<Group> {
    if rows == 0 {
        return Vec::new();
    }
    let size = rows.div_ceil(rows.div_ceil(max));
    (0..rows).step_by(size).map(|first| Group { first, rows: size.min(rows - first) }).collect()
}

/// Calls `work` with every tile of `outputs` columns and groups of rows that it is to be multiplied with; each tile with
/// each group once, on several threads if `worth_threads`.
pub fn for_tiles(outputs: usize, groups: &[Group], worth_threads: bool, work: impl Fn(usize, &[Group]) + Sync) {
    let Some(group) = groups.first() else { return };
    let blocks: Vec<&[Group]> = groups.chunks((ROW_BLOCK / group.rows).max(1)).collect();
    let tiles = outputs.div_ceil(TILE);
    let portion = tiles.div_ceil(PORTIONS * rayon::current_num_threads()).max(1);
    let task = |task: usize| {
        let (tiles_from, block) = (task / blocks.len() * portion, blocks[task % blocks.len()]);
        (tiles_from..(tiles_from + portion).min(tiles)).for_each(|tile| work(tile, block));
    };
    let tasks = tiles.div_ceil(portion) * blocks.len();
    match worth_threads {
        true => (0..tasks).into_par_iter().for_each(task),
        false => (0..tasks).for_each(task),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn groups_are_even_and_hold_every_row_once() {
        assert_eq!(split(13, 12), [Group { first: 0, rows: 7 }, Group { first: 7, rows: 6 }]);
        assert_eq!(split(0, 12), []);
        for rows in 1..100 {
            let groups = split(rows, 6);
            assert!(groups.iter().all(|group| (1..=6).contains(&group.rows)));
            let held: Vec<usize> = groups.iter().flat_map(|group| group.first..group.first + group.rows).collect();
            assert_eq!(held, (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn each_tile_meets_each_group_once() {
        for (outputs, rows, worth_threads) in [(1, 1, false), (700, 300, true), (64, 13, true), (0, 5, true)] {
            let met = Mutex::new(Vec::new());
            for_tiles(outputs, &split(rows, 12), worth_threads, |tile, groups| {
                met.lock().unwrap().extend(groups.iter().map(|group| (tile, group.first)));
            });
            let mut met = met.into_inner().unwrap();
            met.sort_unstable();
            let groups = split(rows, 12);
            let all = (0..outputs.div_ceil(TILE)).flat_map(|tile| groups.iter().map(move |group| (tile, group.first)));
            assert_eq!(met, all.collect::<Vec<_>>());
        }
    }
}
