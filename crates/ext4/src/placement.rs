//! Where regions lie: their chunks of 512 KiB go to chunks of the image, in order, around the
//! backups, leaving out chunks without a live block.
//!
//! Knows nothing of files. A chunk keeps its inside as it is, so equal regions give equal
//! chunks in different images.

use crate::extent::Extent;
use crate::format::{index, lo32};
use crate::geometry::{CHUNK_BLOCKS, Geometry};
use crate::survey::Live;
use crate::tree::Run;

/// A run of blocks that the caller must bring from a region to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Move {
    /// Which region.
    pub region: u32,
    /// First block within the region.
    pub region_block: u64,
    /// First block within the image.
    pub image_block: u64,
    /// Length in blocks.
    pub blocks: u64,
}

/// The chunk of a region that has no place in the image.
const DEAD: u32 = u32::MAX;

/// The image chunk of every chunk of every region.
pub(crate) struct Placement {
    chunks: Vec<Vec<u32>>,
    /// One past the last live block, or the end of the metadata.
    pub(crate) end: u64,
}

impl Placement {
    pub(crate) fn new(geometry: &Geometry, live: &[Live], metadata_end: u64) -> Self {
        let mut next = metadata_end.div_ceil(CHUNK_BLOCKS);
        let mut end = metadata_end;
        let mut chunks = Vec::with_capacity(live.len());
        for region in live {
            let mut places = vec![DEAD; region.chunks()];
            for (n, place) in places.iter_mut().enumerate() {
                let bits = region.chunk(n);
                if bits == 0 {
                    continue;
                }
                while geometry.chunk_is_blocked(next) {
                    next += 1;
                }
                *place = lo32(next);
                end = next * CHUNK_BLOCKS + u64::from(128 - bits.leading_zeros());
                next += 1;
            }
            chunks.push(places);
        }
        Self { chunks, end }
    }

    /// The pieces of a run in the image, cut at chunks.
    pub(crate) fn pieces(&self, run: Run) -> impl Iterator<Item = Extent> + '_ {
        let end = run.region_block + run.blocks;
        let mut at = run.region_block;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let within = at % CHUNK_BLOCKS;
            let blocks = (CHUNK_BLOCKS - within).min(end - at);
            let places = self.chunks.get(run.region as usize);
            let chunk = places.and_then(|p| p.get(index(at / CHUNK_BLOCKS))).copied();
            let file_block = run.file_block + (at - run.region_block);
            at += blocks;
            let start = u64::from(chunk.unwrap_or(DEAD)) * CHUNK_BLOCKS + within;
            Some(Extent { file_block, start, blocks })
        })
    }

    /// All live blocks, in ascending order of region and image, adjacent ones merged.
    pub(crate) fn moves<'a>(&'a self, live: &'a [Live]) -> impl Iterator<Item = Move> + 'a {
        let regions = self.chunks.iter().zip(live).zip(0..);
        let pieces = regions.flat_map(|((places, live), region)| {
            let placed = places.iter().enumerate().filter(|(_, place)| **place != DEAD);
            placed.flat_map(move |(n, &place)| {
                Ones(live.chunk(n)).map(move |(offset, blocks)| Move {
                    region,
                    region_block: n as u64 * CHUNK_BLOCKS + offset,
                    image_block: u64::from(place) * CHUNK_BLOCKS + offset,
                    blocks,
                })
            })
        });
        merge(pieces)
    }
}

/// The runs of ones in a word: offset and length.
struct Ones(u128);

impl Iterator for Ones {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.0 == 0 {
            return None;
        }
        let offset = self.0.trailing_zeros();
        let length = (self.0 >> offset).trailing_ones();
        let end = offset + length;
        self.0 = if end == 128 { 0 } else { self.0 >> end << end };
        Some((offset.into(), length.into()))
    }
}

fn merge(mut pieces: impl Iterator<Item = Move>) -> impl Iterator<Item = Move> {
    let mut pending = pieces.next();
    std::iter::from_fn(move || {
        let mut current = pending.take()?;
        for piece in pieces.by_ref() {
            if piece.region == current.region
                && piece.region_block == current.region_block + current.blocks
                && piece.image_block == current.image_block + current.blocks
            {
                current.blocks += piece.blocks;
            } else {
                pending = Some(piece);
                break;
            }
        }
        Some(current)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_ones_are_found_at_both_ends_of_a_word() {
        let word = 1 | 0b110 << 60 | 1 << 127;
        assert_eq!(Ones(word).collect::<Vec<_>>(), [(0, 1), (61, 2), (127, 1)]);
        assert_eq!(Ones(u128::MAX).collect::<Vec<_>>(), [(0, 128)]);
    }
}
