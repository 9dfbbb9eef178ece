//! Where artifacts and layers are kept, and for how long.

use super::{Kind, SOME, Setting, setting};

const BACKENDS: Kind = Kind::Choice {
    words: &["local", "filesystem", "s3", "minio", "gcs"],
    later: &["nfs", "iscsi", "azure", "ceph", "distributed"],
    why: "mount a file system and use `local`, or an S3-compatible server with `s3`",
};

pub(super) const STORAGE: &[Setting] = &[
    setting(
        "STORAGE_BACKEND",
        BACKENDS,
        "local",
        "README",
        "Where artifacts are kept; `filesystem` is `local`, `minio` is `s3`. `nfs`, \
         `iscsi`, `azure`, `ceph` and `distributed` are unimplemented: mount a file \
         system and use `local`, or an S3-compatible server.",
    ),
    setting(
        "ENABLE_ENCRYPTION",
        Kind::Flag,
        "false",
        "guide",
        "Whether artifacts of every tenant are encrypted where they lie (AES-256-GCM, each tenant \
         with keys of its own). Those of the tiers enterprise and dedicated always are. What is \
         encrypted is shared with nobody; its layers are kept encrypted too.",
    ),
    setting(
        "STORAGE_RETENTION_DAYS",
        SOME,
        "30",
        "README",
        "Days after which an artifact is removed.",
    ),
    setting(
        "STORAGE_MAX_SIZE_GB",
        Kind::Size,
        "100",
        "README",
        "All artifacts together; the oldest go when there are more.",
    )
    .also(&["MAX_STORAGE_SIZE"]),
    setting(
        "STORAGE_CACHE_ENABLED",
        Kind::Flag,
        "true",
        "README",
        "Whether layers are kept for the next build, and whether the same image is built \
         only once.",
    ),
    setting(
        "STORAGE_CACHE_MAX_SIZE_GB",
        Kind::Size,
        "50",
        "README",
        "What the layer cache is pruned to. `builderd build` reads it under the name \
         CACHE_LIMIT.",
    )
    .also(&["CACHE_LIMIT"]),
    setting(
        "CACHE_DIR",
        Kind::Path,
        "",
        "guide",
        "Where the layer cache is; `cache` in WORKSPACE_DIR when empty. `builderd build` \
         reads it, too.",
    ),
    setting("S3_BUCKET", Kind::Text, "", "guide", "Bucket of `s3` and `minio`.")
        .also(&["MINIO_BUCKET"]),
    setting("S3_REGION", Kind::Text, "us-east-1", "guide", "Its region."),
    setting(
        "S3_ENDPOINT",
        Kind::Text,
        "",
        "ours",
        "URL of an S3-compatible server; Amazon's when empty.",
    )
    .also(&["MINIO_ENDPOINT"]),
    setting("S3_ACCESS_KEY_ID", Kind::Text, "", "guide", "Access key.").also(&["MINIO_ACCESS_KEY"]),
    setting("S3_SECRET_ACCESS_KEY", Kind::Secret, "", "guide", "Its secret.")
        .also(&["MINIO_SECRET_KEY"]),
    setting("STORAGE_PREFIX", Kind::Text, "", "ours", "Put before every key of the bucket."),
    setting(
        "S3_ALLOW_HTTP",
        Kind::Flag,
        "false",
        "ours",
        "Whether S3_ENDPOINT may be a plain `http://` URL.",
    ),
    setting("GCS_BUCKET", Kind::Text, "", "guide", "Bucket of `gcs`."),
    setting(
        "GCS_CREDENTIALS_FILE",
        Kind::Path,
        "",
        "guide",
        "Key file of the service account of `gcs`; the machine's own when empty.",
    ),
];
