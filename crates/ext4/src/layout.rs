//! The plan of an image: how large it is and where everything lies.
//!
//! The size depends on what must be stored, and what must be stored (descriptors, inode
//! tables, the journal, extent trees around backups) depends on the size. So the plan is made
//! for a size, says how much it would have needed, and is made again until it fits.

use crate::error::LayoutError;
use crate::extent::{Extent, Merger, tree_blocks};
use crate::format::{BLOCK_SIZE, BLOCKS_PER_GROUP, lo32};
use crate::geometry::{Allocator, Area, BLOCKS_MAX, Geometry, Span};
use crate::journal;
use crate::options::{Options, Size};
use crate::placement::{Move, Placement};
use crate::survey::Survey;
use crate::tree::{InodeId, Kind, Tree};

/// A finished plan for one tree: how large the image is, and what lies where.
pub struct Layout {
    pub(crate) options: Options,
    pub(crate) survey: Survey,
    pub(crate) plan: Plan,
    image_bytes: u64,
}

/// Numbers about a planned image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Length of the image file in bytes.
    pub image_bytes: u64,
    /// Blocks of the file system; one block is 4096 bytes.
    pub blocks: u64,
    /// Blocks nobody uses.
    pub blocks_free: u64,
    /// Groups of 128 MiB.
    pub groups: u64,
    /// All inodes.
    pub inodes: u64,
    /// Inodes in use, the reserved ones included.
    pub inodes_used: u64,
    /// Directories of the tree, `lost+found` included.
    pub directories: u64,
    /// Bytes of file contents.
    pub data_bytes: u64,
    /// Bytes set aside for the journal.
    pub journal_bytes: u64,
    /// Bytes of everything else in use: superblocks, tables, directories, attributes, maps.
    pub metadata_bytes: u64,
    /// How large `resize2fs` can make the file system, online or offline.
    pub growth_bytes_max: u64,
}

/// What lies where, for one size.
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) areas: Areas,
    pub(crate) placement: Placement,
    /// Blocks in use.
    used: u64,
    /// Blocks an image must have for this plan.
    needed: u64,
}

/// Where metadata lies, in ascending order.
pub(crate) struct Areas {
    pub(crate) block_bitmaps: Area,
    pub(crate) inode_bitmaps: Area,
    /// First block of each group's inode table.
    pub(crate) inode_tables: Vec<u64>,
    /// The double indirect block of the resize inode.
    pub(crate) resize: Area,
    pub(crate) directories: Area,
    pub(crate) xattrs: Area,
    pub(crate) extents: Area,
    pub(crate) symlinks: Area,
    pub(crate) journal: Area,
    end: u64,
}

impl Areas {
    fn new(geometry: &Geometry, survey: &Survey, extent_blocks: u64, journal_blocks: u64) -> Self {
        let mut allocator = Allocator::new(geometry);
        let table = geometry.inode_table_blocks();
        Self {
            block_bitmaps: allocator.take(geometry.groups),
            inode_bitmaps: allocator.take(geometry.groups),
            inode_tables: (0..geometry.groups).map(|_| allocator.take_whole(table)).collect(),
            resize: allocator.take(1),
            directories: allocator.take(survey.directory_blocks),
            xattrs: allocator.take(survey.xattr_blocks),
            extents: allocator.take(extent_blocks),
            symlinks: allocator.take(survey.symlink_blocks),
            journal: allocator.take(journal_blocks),
            end: allocator.next(),
        }
    }

    fn spans(&self, table_blocks: u64) -> impl Iterator<Item = Span> + '_ {
        let tables = self.inode_tables.iter();
        let tables = tables.map(move |&start| Span { start, blocks: table_blocks });
        let before = [&self.block_bitmaps, &self.inode_bitmaps];
        let after = [
            &self.resize,
            &self.directories,
            &self.xattrs,
            &self.extents,
            &self.symlinks,
            &self.journal,
        ];
        let before = before.into_iter().flat_map(|area| area.spans().iter().copied());
        let after = after.into_iter().flat_map(|area| area.spans().iter().copied());
        before.chain(tables).chain(after)
    }
}

impl Plan {
    /// Plans for `total_blocks`, going past the end where they do not suffice.
    fn new<T: Tree>(tree: &T, options: &Options, survey: &Survey, total_blocks: u64) -> Self {
        let geometry = Geometry::new(
            total_blocks,
            survey.last_number().into(),
            options.growth_factor.into(),
            options.bytes_per_inode.into(),
        );
        let journal_blocks = if options.journal { journal::blocks_for(total_blocks) } else { 0 };
        // Extent trees move what follows them, which may change the extents: reserve, look
        // again, and reserve more until it suffices.
        let mut extent_blocks = 0;
        let (mut areas, placement) = loop {
            let areas = Areas::new(&geometry, survey, extent_blocks, journal_blocks);
            let placement = Placement::new(&geometry, &survey.live, areas.end);
            let counted = count_extent_blocks(tree, survey, &areas, &placement);
            if counted <= extent_blocks {
                extent_blocks = counted;
                break (areas, placement);
            }
            extent_blocks = counted;
        };
        areas.extents.truncate(extent_blocks);
        let mut plan = Self { geometry, areas, placement, used: 0, needed: 0 };
        plan.used = plan.metadata_spans().iter().map(|s| s.blocks).sum::<u64>();
        plan.used += survey.data_blocks;
        plan.needed = plan.placement.end.max(plan.geometry.blocks_for_inodes);
        if let Some((_, least)) = plan.geometry.short_last_group() {
            plan.needed = plan.needed.max(least);
        }
        plan
    }

    /// Blocks an image must have so that `bytes` stay free.
    fn needed_with_free(&self, bytes: u64) -> u64 {
        if bytes == 0 {
            return self.needed;
        }
        // The kernel keeps 2 % of the blocks, at most 4096, from everyone (s_resv_clusters).
        let kept = (self.geometry.total_blocks / 50).min(4096);
        self.needed.max(self.used.saturating_add(bytes.div_ceil(BLOCK_SIZE)).saturating_add(kept))
    }

    /// Everything in use but file contents, ascending and disjoint.
    pub(crate) fn metadata_spans(&self) -> Vec<Span> {
        let base = self.geometry.base_blocks();
        let bases = self.geometry.groups_with_backup();
        let bases = bases.map(|g| Span { start: g * BLOCKS_PER_GROUP, blocks: base });
        let areas = self.areas.spans(self.geometry.inode_table_blocks());
        let mut spans: Vec<_> = bases.chain(areas).collect();
        spans.sort_unstable();
        spans
    }

    /// The extents of a file.
    pub(crate) fn file_extents<T: Tree>(
        &self,
        tree: &T,
        file: InodeId,
    ) -> impl Iterator<Item = Extent> {
        file_extents(tree, &self.placement, file)
    }
}

fn file_extents<T: Tree>(
    tree: &T,
    placement: &Placement,
    file: InodeId,
) -> impl Iterator<Item = Extent> {
    Merger::new(tree.runs(file).flat_map(|run| placement.pieces(run)))
}

/// The extents of something that takes blocks `first..first + blocks` of an area.
pub(crate) fn area_extents(
    area: &Area,
    first: u64,
    blocks: u64,
) -> impl Iterator<Item = Extent> + '_ {
    let mut file_block = 0;
    Merger::new(area.part(first, blocks).map(move |span| {
        let extent = Extent { file_block, start: span.start, blocks: span.blocks };
        file_block += span.blocks;
        extent
    }))
}

fn count_extent_blocks<T: Tree>(
    tree: &T,
    survey: &Survey,
    areas: &Areas,
    placement: &Placement,
) -> u64 {
    let files = survey.fragmented.iter();
    let files = files.map(|&file| file_extents(tree, placement, file).count() as u64);
    let mut first = survey.directory_blocks;
    first -= survey.directories.iter().map(|d| d.blocks).sum::<u64>();
    let directories = survey.directories.iter().map(|directory| {
        let extents = area_extents(&areas.directories, first, directory.blocks).count() as u64;
        first += directory.blocks;
        extents
    });
    let journal = area_extents(&areas.journal, 0, areas.journal.blocks()).count() as u64;
    files.chain(directories).map(tree_blocks).sum::<u64>() + tree_blocks(journal)
}

impl Layout {
    /// Plans an image of `tree`; `region_blocks[r]` is the length of region `r` in blocks.
    ///
    /// # Errors
    /// What a tree or options may have wrong is listed at [`LayoutError`].
    pub fn plan<T: Tree>(
        tree: &T,
        options: &Options,
        region_blocks: &[u64],
    ) -> Result<Self, LayoutError> {
        check(options)?;
        let survey = Survey::new(tree, options, region_blocks)?;
        let make = |blocks| Plan::new(tree, options, &survey, blocks);
        let (plan, image_bytes) = match options.size {
            Size::FreeSpace { bytes } => {
                let plan = settle(make, 1, bytes)?;
                let image_bytes = plan.geometry.total_blocks * BLOCK_SIZE;
                (plan, image_bytes)
            }
            Size::Exact { bytes } => (exact(make, bytes)?, bytes),
        };
        let inodes = plan.geometry.groups * plan.geometry.inodes_per_group;
        if inodes > u32::MAX.into() {
            return Err(LayoutError::TooLarge { what: "inodes", limit: u32::MAX.into() });
        }
        Ok(Self { options: options.clone(), survey, plan, image_bytes })
    }

    /// Length of the image in bytes; the caller gives the output this size.
    pub fn size_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// The runs of data the caller must bring into the image, ascending by image block,
    /// adjacent ones merged.
    pub fn moves(&self) -> impl Iterator<Item = Move> {
        self.plan.placement.moves(&self.survey.live)
    }

    /// Numbers about the planned image.
    pub fn summary(&self) -> Summary {
        let geometry = &self.plan.geometry;
        let data_bytes = self.survey.data_blocks * BLOCK_SIZE;
        let journal_bytes = self.plan.areas.journal.blocks() * BLOCK_SIZE;
        let descriptors = geometry.descriptor_blocks + geometry.reserved_blocks;
        Summary {
            image_bytes: self.image_bytes,
            blocks: geometry.total_blocks,
            blocks_free: geometry.total_blocks - self.plan.used,
            groups: geometry.groups,
            inodes: geometry.groups * geometry.inodes_per_group,
            inodes_used: self.survey.last_number().into(),
            directories: self.survey.directories.len() as u64
                + u64::from(self.survey.makes_lost_found),
            data_bytes,
            journal_bytes,
            metadata_bytes: self.plan.used * BLOCK_SIZE - data_bytes - journal_bytes,
            growth_bytes_max: (descriptors * 64 * BLOCKS_PER_GROUP).min(BLOCKS_MAX) * BLOCK_SIZE,
        }
    }

    /// Everything in use, contents included, ascending and disjoint.
    pub(crate) fn used_spans(&self) -> impl Iterator<Item = Span> + '_ {
        let mut metadata = self.plan.metadata_spans().into_iter().peekable();
        let data = self.moves().map(|m| Span { start: m.image_block, blocks: m.blocks });
        let mut data = data.peekable();
        std::iter::from_fn(move || match (metadata.peek(), data.peek()) {
            (Some(m), Some(d)) if m.start < d.start => metadata.next(),
            (Some(_), None) => metadata.next(),
            (Some(_) | None, Some(_)) => data.next(),
            (None, None) => None,
        })
    }
}

/// Plans again and again, each time for the size the last plan asked for, until one fits.
/// The need never falls with the size, so this ends at the smallest size from `blocks` on.
fn settle(make: impl Fn(u64) -> Plan, blocks: u64, free_bytes: u64) -> Result<Plan, LayoutError> {
    let mut blocks = blocks;
    loop {
        if blocks > BLOCKS_MAX {
            return Err(LayoutError::TooLarge { what: "blocks", limit: BLOCKS_MAX });
        }
        let plan = make(blocks);
        let needed = plan.needed_with_free(free_bytes);
        if needed <= blocks {
            return Ok(plan);
        }
        blocks = needed;
    }
}

/// Plans for exactly `bytes`. A last group too short to be of use stays outside of the file
/// system.
fn exact(make: impl Fn(u64) -> Plan, bytes: u64) -> Result<Plan, LayoutError> {
    let blocks = bytes / BLOCK_SIZE;
    if blocks > BLOCKS_MAX {
        return Err(LayoutError::TooLarge { what: "blocks", limit: BLOCKS_MAX });
    }
    let mut plan = make(blocks.max(1));
    if let Some((start, _)) = plan.geometry.short_last_group().filter(|group| group.0 > 0) {
        plan = make(start);
    }
    if plan.needed <= blocks.min(plan.geometry.total_blocks) {
        return Ok(plan);
    }
    let fitting = settle(make, blocks.max(1), 0)?;
    let needed_bytes = fitting.geometry.total_blocks * BLOCK_SIZE;
    Err(LayoutError::TooSmall { size_bytes: bytes, needed_bytes })
}

fn check(options: &Options) -> Result<(), LayoutError> {
    let wrong = |option, problem| Err(LayoutError::Option { option, problem });
    if options.boot_area.len() > Options::BOOT_AREA_BYTES_MAX {
        return wrong("boot_area", "it must not exceed 1024 bytes");
    }
    if let Size::Exact { bytes } = options.size
        && !bytes.is_multiple_of(BLOCK_SIZE)
    {
        return wrong("size", "it must be a multiple of 4096");
    }
    if !(1..=1024).contains(&options.growth_factor) {
        return wrong("growth_factor", "it must be within 1 to 1024");
    }
    if !(1024..=1 << 26).contains(&options.bytes_per_inode) {
        return wrong("bytes_per_inode", "it must be within 1024 to 67108864");
    }
    if options.created.nanos >= 1_000_000_000 {
        return wrong("created", "nanoseconds must be below 1000000000");
    }
    Ok(())
}

/// A path to `inode`, for messages: `/` for the root, nothing for what no directory names.
pub fn path_of<T: Tree>(tree: &T, inode: InodeId) -> Option<Vec<u8>> {
    if inode == InodeId::ROOT {
        return Some(b"/".to_vec());
    }
    // Directories in the order they are found: where from, and the name's place there.
    let mut found: Vec<(InodeId, usize, usize)> = vec![(InodeId::ROOT, 0, 0)];
    let mut next = 0;
    while next < found.len() && found.len() <= tree.inode_count() as usize {
        for (place, entry) in tree.entries(found[next].0).enumerate() {
            if entry.inode == inode {
                return Some(path_through(tree, &found, next, entry.name));
            }
            let is_known = entry.inode.0 < tree.inode_count();
            if is_known && tree.inode(entry.inode).kind == Kind::Directory {
                found.push((entry.inode, next, place));
            }
        }
        next += 1;
    }
    None
}

fn path_through<T: Tree>(
    tree: &T,
    found: &[(InodeId, usize, usize)],
    directory: usize,
    name: &[u8],
) -> Vec<u8> {
    let mut names = vec![name];
    let mut at = directory;
    while at != 0 {
        let (_, parent, place) = found[at];
        names.extend(tree.entries(found[parent].0).nth(place).map(|e| e.name));
        at = parent;
    }
    names.reverse();
    names.iter().flat_map(|name| b"/".iter().chain(*name)).copied().collect()
}

/// The block numbers of the journal fit its 32-bit length.
pub(crate) fn journal_blocks(plan: &Plan) -> u32 {
    lo32(plan.areas.journal.blocks())
}
