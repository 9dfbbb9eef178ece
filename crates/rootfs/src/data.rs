//! The data area of a pack: file contents block after block, runs of zeroes left out, a
//! checksum per chunk. Knows nothing of tars or paths.

use std::io::{self, Write};

use crate::{Limits, Tally};

/// A block of contents.
pub(crate) const BLOCK: usize = 4096;
/// What one checksum covers.
pub(crate) const CHUNK: usize = 512 << 10;
/// What one write to the output holds.
const FLUSH: usize = 1 << 20;
/// Zero blocks in a row that become a hole.
const HOLE_BLOCKS: usize = 16;

/// Why contents could not be stored.
#[derive(Debug)]
pub(crate) enum DataError {
    Write(io::Error),
    /// More than `Limits::data_bytes_max`.
    Limit,
    /// More than `Limits::image_data_bytes_max`, with the other layers.
    ImageLimit,
}

/// One stored run of a file: blocks of hole before it, then its length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredRun {
    pub(crate) gap: u64,
    pub(crate) blocks: u64,
}

/// Writes contents of files back to back, each from a block boundary on.
pub(crate) struct DataWriter<'w, W> {
    out: &'w mut W,
    limits: &'w Limits,
    tally: &'w Tally,
    /// `FLUSH` bytes that can be written, then room for zero blocks not yet decided upon.
    buffer: Vec<u8>,
    /// Bytes of whole blocks in `buffer`.
    at: usize,
    /// Bytes of the block after them.
    partial: usize,
    written: u64,
    crcs: Vec<u32>,
    /// Finished runs of the current file.
    runs: Vec<StoredRun>,
    /// The run being written.
    run: StoredRun,
    /// Zero blocks seen after it, not stored yet.
    zeroes: u64,
    /// Some of them are a hole because the tar says so.
    declared: bool,
}

impl<'w, W: Write> DataWriter<'w, W> {
    pub(crate) fn new(out: &'w mut W, limits: &'w Limits, tally: &'w Tally) -> Self {
        Self {
            out,
            limits,
            tally,
            buffer: vec![0; FLUSH + (HOLE_BLOCKS + 1) * BLOCK],
            at: 0,
            partial: 0,
            written: 0,
            crcs: Vec::new(),
            runs: Vec::new(),
            run: StoredRun::default(),
            zeroes: 0,
            declared: false,
        }
    }

    /// Stores the next bytes of the current file.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), DataError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.partial));
            let start = self.at + self.partial;
            self.buffer[start..start + now.len()].copy_from_slice(now);
            self.partial += now.len();
            bytes = later;
            if self.partial == BLOCK {
                self.end_block()?;
            }
        }
        Ok(())
    }

    /// A hole of the current file, as the tar declares it. Every whole block of it stays one.
    pub(crate) fn hole(&mut self, length: u64) -> Result<(), DataError> {
        let mut left = length;
        if self.partial > 0 {
            let rest = ((BLOCK - self.partial) as u64).min(left);
            self.zero_fill(rest)?;
            left -= rest;
        }
        if left >= BLOCK as u64 {
            self.zeroes += left / BLOCK as u64;
            self.declared = true;
        }
        self.zero_fill(left % BLOCK as u64)
    }

    /// Ends the current file and gives its runs; none for a file that is empty or all hole.
    pub(crate) fn end_file(&mut self) -> Result<Vec<StoredRun>, DataError> {
        if self.partial > 0 {
            self.zero_fill((BLOCK - self.partial) as u64)?;
        }
        if !self.zeroes_are_a_hole() {
            self.store_zeroes();
            self.flush_full()?;
        }
        self.end_run();
        (self.zeroes, self.declared) = (0, false);
        self.run = StoredRun::default();
        Ok(std::mem::take(&mut self.runs))
    }

    /// Writes what is left. Gives the length of the data area and its checksums.
    pub(crate) fn finish(mut self) -> Result<(u64, Vec<u32>), DataError> {
        let rest = self.at;
        self.flush(rest)?;
        Ok((self.written, self.crcs))
    }

    /// Zeroes that do not reach beyond the current block.
    fn zero_fill(&mut self, length: u64) -> Result<(), DataError> {
        let length = usize::try_from(length).unwrap_or(BLOCK).min(BLOCK - self.partial);
        let start = self.at + self.partial;
        self.buffer[start..start + length].fill(0);
        self.partial += length;
        if self.partial == BLOCK { self.end_block() } else { Ok(()) }
    }

    fn end_block(&mut self) -> Result<(), DataError> {
        self.partial = 0;
        if is_zero(&self.buffer[self.at..self.at + BLOCK]) {
            self.zeroes += 1;
            return Ok(());
        }
        if self.zeroes_are_a_hole() {
            self.end_run();
            self.run.gap = std::mem::take(&mut self.zeroes);
            self.declared = false;
        } else if self.zeroes > 0 {
            let block = self.at..self.at + BLOCK;
            let behind = self.at + usize::try_from(self.zeroes).unwrap_or(0) * BLOCK;
            self.buffer.copy_within(block, behind);
            self.store_zeroes();
        }
        self.run.blocks += 1;
        self.at += BLOCK;
        self.flush_full()
    }

    fn zeroes_are_a_hole(&self) -> bool {
        self.declared || self.zeroes >= HOLE_BLOCKS as u64
    }

    /// The zero blocks seen are too few for a hole.
    fn store_zeroes(&mut self) {
        let zeroes = std::mem::take(&mut self.zeroes);
        let end = self.at + usize::try_from(zeroes).unwrap_or(0) * BLOCK;
        self.buffer[self.at..end].fill(0);
        self.at = end;
        self.run.blocks += zeroes;
    }

    /// What follows is another run. A gap without blocks belongs to the next one.
    fn end_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        if run.blocks > 0 {
            self.runs.push(run);
        }
    }

    fn flush_full(&mut self) -> Result<(), DataError> {
        if self.at >= FLUSH { self.flush(FLUSH) } else { Ok(()) }
    }

    fn flush(&mut self, length: usize) -> Result<(), DataError> {
        if self.written + length as u64 > self.limits.data_bytes_max {
            return Err(DataError::Limit);
        }
        self.tally.stored(length as u64, self.limits).map_err(|_| DataError::ImageLimit)?;
        let (now, later) = self.buffer.split_at(length);
        self.crcs.extend(now.chunks(CHUNK).map(crc32c::crc32c));
        self.out.write_all(now).map_err(DataError::Write)?;
        self.written += length as u64;
        let kept = (self.at + self.partial).saturating_sub(length).min(later.len());
        self.buffer.copy_within(length..length + kept, 0);
        self.at -= length;
        Ok(())
    }
}

fn is_zero(block: &[u8]) -> bool {
    // Most blocks are told by their first bytes; the folds compile to vector code.
    block[..16].iter().all(|byte| *byte == 0)
        && block.chunks(256).all(|part| part.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The runs and the data area of one file.
    fn store(pieces: &[(u64, &[u8])]) -> (Vec<(u64, u64)>, Vec<u8>) {
        let mut out = Vec::new();
        let (limits, tally) = (Limits::default(), Tally::default());
        let mut writer = DataWriter::new(&mut out, &limits, &tally);
        for (hole, bytes) in pieces {
            writer.hole(*hole).unwrap();
            writer.write(bytes).unwrap();
        }
        let runs = writer.end_file().unwrap();
        let (length, crcs) = writer.finish().unwrap();
        assert_eq!(length, out.len() as u64);
        assert_eq!(crcs, out.chunks(CHUNK).map(crc32c::crc32c).collect::<Vec<_>>());
        (runs.iter().map(|run| (run.gap, run.blocks)).collect(), out)
    }

    #[test]
    fn a_file_ends_on_a_block_boundary_filled_with_zeroes() {
        let (runs, data) = store(&[(0, &[7; 5000])]);
        assert_eq!(runs, [(0, 2)]);
        assert_eq!(data.len(), 8192);
        assert!(data[..5000].iter().all(|byte| *byte == 7));
        assert!(data[5000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn sixteen_zero_blocks_are_a_hole_and_fifteen_are_not() {
        let file = |zeroes: usize| [vec![1; 4096], vec![0; zeroes * 4096], vec![2; 4096]].concat();
        assert_eq!(store(&[(0, &file(15))]), (vec![(0, 17)], file(15)));
        let (runs, data) = store(&[(0, &file(16))]);
        assert_eq!(runs, [(0, 1), (16, 1)]);
        assert_eq!(data, [vec![1; 4096], vec![2; 4096]].concat());
    }

    #[test]
    fn a_file_of_zeroes_is_a_hole_when_it_is_long_enough() {
        assert_eq!(store(&[(0, &[0; 65536])]), (vec![], vec![]));
        assert_eq!(store(&[(0, &[0; 61440])]), (vec![(0, 15)], vec![0; 61440]));
        assert_eq!(store(&[(0, &[0; 61441])]), (vec![], vec![]));
        assert_eq!(store(&[]), (vec![], vec![]));
    }

    #[test]
    fn a_declared_hole_stays_one_however_short() {
        let (runs, data) = store(&[(0, &[1; 100]), (3 * 4096, &[2; 4096])]);
        // 100 bytes, a hole to byte 12388, data to byte 16484: blocks 1 and 2 are whole holes.
        assert_eq!(runs, [(0, 1), (2, 2)]);
        assert_eq!(data[4096..4196], [0; 100]);
        assert_eq!(data[4196..8292], [2; 4096]);
        assert_eq!(store(&[(1 << 50, &[])]), (vec![], vec![]));
        let (runs, _) = store(&[(1 << 50, &[1])]);
        assert_eq!(runs, [((1 << 50) / 4096, 1)]);
    }

    #[test]
    fn zeroes_across_a_full_buffer_are_kept_in_order() {
        let mut file = Vec::new();
        for block in 0..1024_u32 {
            let fill = if block % 19 < 14 { 0 } else { block.to_le_bytes()[0] | 1 };
            file.extend_from_slice(&[fill; 4096]);
        }
        let (runs, data) = store(&[(0, &file)]);
        assert_eq!(runs, [(0, 1024)]);
        assert!(data == file);
    }
}
