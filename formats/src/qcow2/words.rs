//! A table of words in memory whose end is mostly zeroes: these take none.
//!
//! A refcount table is one cluster at least and has an entry in its first words only; the layers of
//! a chain keep one each. Does no I/O.

/// Words of which only those up to the last one that is not zero take memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    /// The first ones; what follows is zeroes.
    first: Vec<u64>,
    count: usize,
}

impl Words {
    /// The table `words`.
    pub(super) fn new(mut words: Vec<u64>) -> Self {
        let count = words.len();
        let used = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        words.truncate(used);
        words.shrink_to_fit();
        Self { first: words, count }
    }

    /// How many words the table has.
    pub(super) fn count(&self) -> u64 {
        self.count as u64
    }

    /// All words but some of the zeroes at the end.
    pub(super) fn used(&self) -> &[u64] {
        &self.first
    }

    /// Word `index`, zero behind the end.
    pub(super) fn get(&self, index: u64) -> u64 {
        let index = usize::try_from(index).ok();
        index.and_then(|at| self.first.get(at)).copied().unwrap_or(0)
    }

    /// Changes word `index`; false if there is none.
    pub(super) fn set(&mut self, index: u64, word: u64) -> bool {
        let Some(at) = usize::try_from(index).ok().filter(|at| *at < self.count) else {
            return false;
        };
        if at >= self.first.len() {
            self.first.resize(at + 1, 0);
        }
        if let Some(old) = self.first.get_mut(at) {
            *old = word;
        }
        true
    }

    /// The whole table.
    pub(super) fn to_vec(&self) -> Vec<u64> {
        let mut words = self.first.clone();
        words.resize(self.count, 0);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_at_the_end_of_a_table_take_no_memory_and_are_there() {
        let table = [vec![7, 0, 9], vec![0; 8000]].concat();
        let mut words = Words::new(table.clone());
        assert_eq!((words.count(), words.used().len()), (8003, 3));
        assert!(words.to_vec() == table && words.first.capacity() < 100);
        assert_eq!([0, 2, 3, 9000].map(|at| words.get(at)), [7, 9, 0, 0]);
        assert!(words.set(5, 4) && !words.set(8003, 1));
        assert_eq!((words.used(), words.count()), (&[7, 0, 9, 0, 0, 4][..], 8003));
    }
}
