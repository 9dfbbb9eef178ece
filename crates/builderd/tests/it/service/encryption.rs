//! Stories about artifacts that lie encrypted.

use super::*;

const CANARY: &str = "canary-5b81-which-only-its-tenant-may-read";

/// A stage whose image has the canary in a file.
fn stage() -> Stage {
    let mut stage = Stage::new();
    let secret = Layer::new().file("etc/secret", CANARY.repeat(200).as_bytes());
    stage.image = TestImage::new(vec![secret]);
    stage.push("app", &["latest"]);
    stage
}

fn order_at(tier: &str, image: &str) -> Value {
    let mut order = order(image);
    order["config"]["tenant"]["tier"] = json!(tier);
    order
}

impl Stage {
    fn completed(&self, server: &Server, tenant: &str, tier: &str) -> Value {
        let answer = server.well(tenant, "CreateBuild", &order_at(tier, &self.reference("latest")));
        let build = server.finished(tenant, answer["build_id"].as_str().unwrap());
        assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
        build
    }

    fn leaks(&self) -> Vec<PathBuf> {
        files_with(self.workshop.directory.path(), CANARY)
    }

    /// A command of the operator, beside the server.
    fn admin(&self, arguments: &[&str]) -> std::process::Output {
        let data = self.workshop.path("data");
        let mut command = self.workshop.command(&[&["admin"], arguments].concat());
        command.env("UNKEY_BUILDERD_DATABASE_DATA_DIR", data).output().unwrap()
    }

    fn admin_well(&self, arguments: &[&str]) -> String {
        let done = self.admin(arguments);
        assert!(done.status.success(), "{arguments:?}: {}", stderr(&done));
        String::from_utf8(done.stdout).unwrap()
    }
}

impl Server {
    /// An answer to a download: its status, and its body if that came whole.
    fn download(&self, tenant: &str, id: &str, range: Option<&str>) -> (u16, Option<Vec<u8>>) {
        let url = format!("http://{}{RPC}/GetBuildArtifact/{id}", self.address);
        let request = self.http.get(url).header("X-Tenant-ID", tenant);
        let request =
            range.into_iter().fold(request, |request, range| request.header("Range", range));
        let answer = request.send().unwrap();
        let status = answer.status().as_u16();
        (status, answer.bytes().ok().map(|body| body.to_vec()))
    }
}

fn text<'a>(build: &'a Value, name: &str) -> &'a str {
    build[name].as_str().unwrap()
}

#[test]
fn an_artifact_of_an_enterprise_tenant_is_nowhere_in_the_open() {
    let stage = stage();
    let server = stage.serve(&[]);
    let build = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    assert!(text(&build, "rootfs_path").contains("tenant-bank/"), "{build:#}");
    assert!(text(&build, "rootfs_path").contains(".sealed-"), "{build:#}");
    // Whoever sees the names must not learn what was built.
    let sum = text(&build, "rootfs_checksum");
    assert!(!text(&build, "rootfs_path").contains(sum), "{build:#}");
    assert_eq!(stage.leaks(), Vec::<PathBuf>::new());
    assert_eq!(stage.workshop.packs(), Vec::<PathBuf>::new(), "no layer is kept in the open");

    // What is downloaded is the plain artifact, and its sizes and sums are told.
    let id = text(&build, "build_id");
    let artifact = server.artifact("bank", id);
    assert_eq!(build["rootfs_checksum"], crate::support::sha256(&artifact));
    assert_eq!(build["rootfs_size_bytes"], artifact.len());
    let at = artifact.windows(CANARY.len()).position(|some| some == CANARY.as_bytes()).unwrap();
    let range = format!("bytes={at}-{}", at + CANARY.len() - 1);
    assert_eq!(server.download("bank", id, Some(&range)), (206, Some(CANARY.into())));
    let stored = std::fs::metadata(text(&build, "rootfs_path")).unwrap().len();
    assert!(stored > artifact.len() as u64);

    // Made once, it is there for the tenant's next build, and for nobody else's.
    let again = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    assert_eq!(again["rootfs_path"], build["rootfs_path"]);
    let other = stage.completed(&server, "other", "TENANT_TIER_DEDICATED");
    assert!(text(&other, "rootfs_path").contains("tenant-other/"), "{other:#}");
    assert_eq!(other["rootfs_checksum"], build["rootfs_checksum"]);
    let file = |build: &Value| {
        let path = PathBuf::from(text(build, "rootfs_path"));
        path.file_name().unwrap().to_str().unwrap().split_once('.').unwrap().0.to_owned()
    };
    assert_ne!(file(&other), file(&build), "nor that two tenants built the same");
    assert_eq!(stage.leaks(), Vec::<PathBuf>::new());

    // The same search finds what is not encrypted: the artifact and the layer.
    let open = stage.completed(&server, "shop", "TENANT_TIER_PRO");
    assert!(text(&open, "rootfs_path").contains("public/"), "{open:#}");
    assert_eq!(stage.leaks().len(), 2, "{:?}", stage.leaks());
}

/// How often the layer with the canary was fetched.
fn fetched(stage: &Stage) -> usize {
    let blob = format!("/blobs/sha256:{}", crate::support::sha256(&stage.image.blobs[0]));
    let requests = stage.registry.requests();
    requests.iter().filter(|asked| asked.method == "GET" && asked.path.ends_with(&blob)).count()
}

/// Another image on the same layer.
fn extend(stage: &mut Stage, name: &str) {
    let secret = Layer::new().file("etc/secret", CANARY.repeat(200).as_bytes());
    stage.image = TestImage::new(vec![secret, Layer::new().file(name, b"more")]);
    stage.push("app", &["latest"]);
}

/// The sealed packs of a tenant.
fn kept(stage: &Stage, tenant: &str) -> Vec<PathBuf> {
    let directory = format!("rootfs/sealed-packs-v1/artifacts/tenant-{tenant}");
    let names = stage.workshop.names(&directory).into_iter();
    names.map(|name| stage.workshop.path(&directory).join(name)).collect()
}

#[test]
fn layers_of_an_enterprise_tenant_are_kept_encrypted_for_its_next_image_alone() {
    let mut stage = stage();
    let server = stage.serve(&[]);
    let tier = "TENANT_TIER_ENTERPRISE";
    stage.completed(&server, "bank", tier);
    assert_eq!((fetched(&stage), kept(&stage, "bank").len()), (1, 1));
    let sum = crate::support::sha256(&stage.image.blobs[0]);
    let named = |path: &PathBuf| path.to_string_lossy().contains(&sum);
    assert!(!kept(&stage, "bank").iter().any(named), "nor does its name tell which one it is");

    extend(&mut stage, "one");
    stage.completed(&server, "bank", tier);
    assert_eq!((fetched(&stage), kept(&stage, "bank").len()), (1, 2));
    stage.completed(&server, "other", tier);
    assert_eq!(fetched(&stage), 2, "who has not fetched it fetches it");

    // A pack that is damaged, or whose key is gone, is fetched and kept anew.
    for path in kept(&stage, "bank") {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    extend(&mut stage, "two");
    stage.completed(&server, "bank", tier);
    assert_eq!(fetched(&stage), 3);
    extend(&mut stage, "three");
    stage.completed(&server, "bank", tier);
    assert_eq!(fetched(&stage), 3);
    stage.admin_well(&["destroy-keys", "bank"]);
    extend(&mut stage, "four");
    stage.completed(&server, "bank", tier);
    assert_eq!(fetched(&stage), 4);

    assert_eq!(stage.leaks(), Vec::<PathBuf>::new());
    assert_eq!(stage.workshop.packs(), Vec::<PathBuf>::new());
    let left = stage.workshop.names("rootfs/sealed-packs-v1/staging");
    assert_eq!(left, Vec::<String>::new(), "what was opened for a build went with it");
}

#[test]
fn encryption_may_be_asked_for_every_tenant() {
    let stage = stage();
    let server = stage.serve(&[("ENABLE_ENCRYPTION", "true")]);
    let build = stage.completed(&server, "shop", "TENANT_TIER_PRO");
    assert!(text(&build, "rootfs_path").contains("tenant-shop/"), "{build:#}");
    assert_eq!(stage.leaks(), Vec::<PathBuf>::new());
    let artifact = server.artifact("shop", text(&build, "build_id"));
    assert_eq!(build["rootfs_checksum"], crate::support::sha256(&artifact));
}

#[test]
fn a_tampered_artifact_breaks_off_and_is_made_anew() {
    let stage = stage();
    let server = stage.serve(&[]);
    let build = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    let (id, path) = (text(&build, "build_id"), PathBuf::from(text(&build, "rootfs_path")));
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    assert_eq!(server.download("bank", id, None), (200, None), "it ends too early");
    let first = server.download("bank", id, Some("bytes=0-99"));
    assert_eq!(first.1.unwrap().len(), 100, "what is whole can be read");
    for broken in [&good[..good.len() - 1], CANARY.as_bytes()] {
        std::fs::write(&path, broken).unwrap();
        let (status, body) = server.download("bank", id, None);
        let body = String::from_utf8(body.unwrap()).unwrap();
        assert_eq!(status, 500, "{body}");
        assert!(!body.contains("tenant-bank"), "the inside of the service stays inside: {body}");
    }
    let again = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    assert_eq!(again["rootfs_path"], build["rootfs_path"]);
    let artifact = server.artifact("bank", id);
    assert_eq!(build["rootfs_checksum"], crate::support::sha256(&artifact));
    // Also where its header and its size are good still.
    let mut bad = std::fs::read(&path).unwrap();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    assert_eq!(server.download("bank", id, None), (200, None));
    stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    let artifact = server.artifact("bank", id);
    assert_eq!(build["rootfs_checksum"], crate::support::sha256(&artifact));
}

#[test]
fn keys_are_rotated_and_destroyed_while_the_server_runs() {
    let stage = stage();
    let server = stage.serve(&[("STORAGE_CACHE_ENABLED", "false")]);
    let unknown = stage.admin(&["rotate-key", "bank"]);
    assert_eq!(unknown.status.code(), Some(3), "{}", stderr(&unknown));
    let old = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    let said = stage.admin_well(&["rotate-key", "bank"]);
    let new = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    let key = text(&new, "rootfs_path").rsplit_once(".sealed-").unwrap().1.to_owned();
    assert!(said.contains(&key), "{said}");
    assert!(!text(&old, "rootfs_path").ends_with(&key));
    let artifacts = [&old, &new].map(|build| server.artifact("bank", text(build, "build_id")));
    assert!(artifacts[0] == artifacts[1]);
    stage.admin_well(&["check"]);

    let other = stage.completed(&server, "other", "TENANT_TIER_ENTERPRISE");
    let said = stage.admin_well(&["destroy-keys", "bank"]);
    assert!(said.contains("2 keys destroyed; 2 builds"), "{said}");
    for build in [&old, &new] {
        let (status, _) = server.download("bank", text(build, "build_id"), None);
        assert_eq!(status, 404);
    }
    assert!(server.artifact("other", text(&other, "build_id")) == artifacts[0]);
    stage.admin_well(&["check"]);
    stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
}

#[test]
fn with_a_new_master_key_old_artifacts_are_lost_and_made_anew() {
    let stage = stage();
    let server = stage.serve(&[]);
    let old = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    drop(server);
    std::fs::remove_file(stage.workshop.path("data/master.key")).unwrap();
    let said = stage.admin_well(&["forget-key"]);
    assert!(said.contains("1 keys of tenants were wrapped by the old key"), "{said}");
    let server = stage.serve(&[]);
    assert_eq!(server.download("bank", text(&old, "build_id"), None).0, 500);
    let new = stage.completed(&server, "bank", "TENANT_TIER_ENTERPRISE");
    assert_ne!(new["rootfs_path"], old["rootfs_path"]);
    let artifact = server.artifact("bank", text(&new, "build_id"));
    assert_eq!(old["rootfs_checksum"], crate::support::sha256(&artifact));
}
