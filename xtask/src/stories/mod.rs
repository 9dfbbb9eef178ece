//! Stories: whole builds of real images, judged by tools that are not ours.
//!
//! All of them are listed here and nowhere else; each is counted, a skip is printed with its
//! reason. Knows the command line of builderd, nothing of its code.

pub(crate) mod attacks;
mod buckets;
mod bytes;
mod cache;
mod clients;
mod crafted;
mod crash;
mod disk;
mod growth;
mod images;
mod lab;
mod older;
mod scale;
mod service;
mod sources;
mod walls;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Error, Result};
pub(crate) use lab::{Lab, Size};

/// How a story ended, short of an error.
pub(crate) enum Verdict {
    Passed,
    Skipped(String),
}

/// What a story is: a sentence that is true when it passes.
struct Story {
    sentence: String,
    run: Run,
}

type Run = Box<dyn Fn(&Lab) -> Result<Verdict>>;

/// How many did what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Makes a story's sentence from its function's name.
macro_rules! stories {
    ($($module:ident::$name:ident),* $(,)?) => {
        vec![$(Story {
            sentence: stringify!($name).replace('_', " "),
            run: Box::new($module::$name),
        }),*]
    };
}

fn all() -> Vec<Story> {
    let mut list = stories![
        images::every_test_image_equals_an_independent_unpack_and_fsck_is_silent,
        images::the_metadata_repeats_what_the_image_says_of_itself,
        images::our_own_reader_agrees_with_the_kernel,
        images::the_image_boots_to_its_own_shell,
        images::peak_memory_stays_below_100_mib,
        bytes::two_builds_give_the_same_bytes_whatever_surrounds_them,
        bytes::an_unprivileged_user_builds_the_same_bytes,
        bytes::source_date_epoch_changes_the_times_and_nothing_else_does,
        bytes::what_an_upper_layer_deleted_is_not_in_the_image,
        bytes::images_that_share_a_base_share_its_chunks,
        sources::archives_layouts_and_registries_give_the_same_tree,
        sources::zstd_layers_and_plain_ones_give_the_same_tree,
        sources::layers_of_zstd_chunked_give_the_same_tree,
        sources::a_compressed_image_unpacks_to_the_plain_one,
        sources::an_unknown_image_and_a_dead_registry_are_told_apart,
        cache::a_warm_build_asks_for_no_layer,
        cache::a_damaged_pack_is_detected_and_made_anew,
        cache::two_processes_share_one_cache,
        cache::prune_and_no_cache_leave_nothing,
        disk::a_full_disk_leaves_no_output,
        disk::packs_and_image_are_all_that_a_build_puts_on_the_disk,
        disk::wherever_packs_and_image_lie_the_bytes_are_the_same,
        disk::where_blocks_can_be_shared_a_known_image_takes_its_metadata_alone,
        disk::a_killed_build_leaves_no_file,
        disk::an_interrupted_build_leaves_no_file,
        disk::an_earlier_image_survives_a_failed_build,
        growth::an_image_grows_sixteenfold_offline_and_online,
        growth::size_and_free_space_are_what_was_asked_for,
        scale::one_directory_of_very_many_files_is_whole,
        scale::time_and_memory_grow_linearly_with_files,
        service::the_printed_order_gives_the_bytes_that_the_command_makes,
        service::a_running_build_is_cancelled_within_a_second,
        service::what_a_stopped_service_cannot_finish_the_next_start_completes,
        service::of_500_orders_at_once_the_last_place_takes_one,
        walls::every_attack_on_a_worker_fails_also_where_cgroups_are_of_version_2,
        attacks::every_attack_by_a_tenant_fails_for_its_reason_and_leaves_the_service_healthy,
        attacks::every_attack_by_a_tenant_fails_where_cgroups_are_of_version_2,
        walls::of_a_stopped_build_nothing_is_left_after_a_second,
        clients::plain_curl_lives_a_builds_life,
        clients::connect_node_lives_a_builds_life_on_every_transport,
        clients::connect_web_in_a_browser_lives_a_builds_life_where_its_origin_may_call,
        clients::python_grpcio_lives_a_builds_life,
        clients::python_grpcio_watches_health_until_the_service_has_stopped,
        clients::a_collector_is_told_of_a_build_and_its_steps,
        clients::buf_curl_lives_a_builds_life_by_reflection_alone,
        clients::py_spiffe_and_the_service_believe_one_agent,
        buckets::an_artifact_lives_its_life_in_a_bucket_of_google_cloud_storage,
        crash::builds_survive_a_service_that_is_killed_again_and_again,
        crash::builds_survive_killed_nodes_and_a_crashed_database,
        crash::builds_survive_while_nodes_of_two_versions_share_a_database,
    ];
    list.extend(crafted::cases().into_iter().map(|case| Story {
        sentence: format!("crafted: {}", case.sentence()),
        run: Box::new(move |lab| case.run(lab)),
    }));
    list
}

/// Runs every story whose sentence contains `filter`.
pub(crate) fn run(
    size: Size,
    filter: &str,
    binary: Option<PathBuf>,
    seed: Option<u64>,
) -> Result<Tally> {
    let stories: Vec<Story> =
        all().into_iter().filter(|story| story.sentence.contains(filter)).collect();
    let lab = Lab::open(size, binary, seed)?;
    let mut tally = Tally::default();
    for story in &stories {
        let started = Instant::now();
        let verdict = (story.run)(&lab).and_then(|verdict| {
            let left = lab.leftovers()?;
            if left.is_empty() { Ok(verdict) } else { Err(Error::msg(left.join("\n"))) }
        });
        let secs = started.elapsed().as_secs_f64();
        match verdict {
            Ok(Verdict::Passed) => {
                tally.passed += 1;
                println!("ok    {:6.1} s  {}", secs, story.sentence);
            }
            Ok(Verdict::Skipped(reason)) => {
                tally.skipped += 1;
                println!("SKIP  {:6.1} s  {}: {reason}", secs, story.sentence);
            }
            Err(error) => {
                tally.failed += 1;
                println!("FAIL  {:6.1} s  {}\n{error:#}", secs, story.sentence);
            }
        }
    }
    Ok(tally)
}
