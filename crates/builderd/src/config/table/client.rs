//! The commands that talk to a server.

use super::{Kind, Reader, Setting, setting};

pub(super) const CLIENT: &[Setting] = &[
    setting(
        "SERVER_ADDRESS",
        Kind::Text,
        "http://localhost:8082",
        "code",
        "The server, for `--server`.",
    )
    .read_by(Reader::Client),
    setting("TOKEN", Kind::Secret, "", "ours", "The token, for `--token`.").read_by(Reader::Client),
    setting("TENANT_ID", Kind::Text, "", "code", "Sent as `X-Tenant-ID`, for `--tenant`.")
        .read_by(Reader::Client),
    setting("CUSTOMER_ID", Kind::Text, "", "ours", "Sent as `X-Customer-ID`, for `--customer`.")
        .also(&["USER_ID"])
        .read_by(Reader::Client),
    setting(
        "SERVER_CA_FILE",
        Kind::Path,
        "",
        "ours",
        "Who signs the server's certificate, in PEM, for `--ca-file`; those that the system \
         trusts when empty.",
    )
    .read_by(Reader::Client),
    setting(
        "CLIENT_CERT_FILE",
        Kind::Path,
        "",
        "ours",
        "The client's certificate, in PEM, for `--cert-file`.",
    )
    .read_by(Reader::Client),
    setting("CLIENT_KEY_FILE", Kind::Path, "", "ours", "Its key, in PEM, for `--key-file`.")
        .read_by(Reader::Client),
];
