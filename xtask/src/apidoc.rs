//! `docs/api.md`: the reference of the API, made from the comments of the proto file, so that
//! there is one text. `cargo xtask docs` writes it; a test compares.

use std::fmt::Write as _;

use anyhow::Result;

use crate::workspace;

const PROTO: &str = "proto/builder/v1/builder.proto";
const PAGE: &str = "docs/api.md";
const HEAD: &str = "\
# API reference

Made from `proto/builder/v1/builder.proto` by `cargo xtask docs`; do not edit.

Base URL `http://HOST:8082`, procedures at `/builder.v1.BuilderService/METHOD`, over Connect (JSON and
binary, HTTP/1.1 and h2c), gRPC and gRPC-Web. gRPC health and reflection are there; a stream to reflection
ends after 30 s, or behind 1 MiB of questions. Plain routes for people and scripts:
`GET .../GetBuildStatus/ID`, `GET .../GetBuildArtifact/ID` (also `ID.sha256`),
`GET .../GetBuildLogs/ID?offset&limit`, `GET .../ListBuilds?status&limit&offset` (a page may have fewer
builds than `limit`: go on behind those that came while it says `has_more`), `GET /health`, `GET /stats`,
`GET /metrics`.

An error has the documentation's HTTP status on the plain routes and for an RPC in JSON without the
header `Connect-Protocol-Version`: 403 for a used-up quota, 429 for too many requests, 503 for a full
disk. Connect's own clients get Connect's status for the code, 429 for each of these three. A body that
has not arrived within 30 s is answered with 408 (`deadline_exceeded`), and its connection is closed.

A message in JSON is an object, with names in snake_case or camelCase. Unknown names are ignored; a word
that an enum does not have is `invalid_argument`, with the field, the word and the words there are, and so
is a number without a word. `status` takes the words of BuildStatus, and their ends in any case: `running`.

`GET /health` answers 200, or 503 with a `reason`: `stopping`, `database_unavailable`,
`database_read_only`, `database_full`, `database_failed`. A server that stops answers one question on each
new connection until it has ended: that one, and anything else with `unavailable` (503).

A build's log has at most 100,000 lines and 16 MiB. The first try may take all of it; for another one the oldest
lines go until half is free. The first line there is, which has the number of the last one that went, says so:
numbers never change.

## Permissions

What a token must include; one that includes less gets `permission_denied`.

| permission | for |
|---|---|
| `build:create` | `CreateBuild`. A key that was used for the same request gives that build to the token that made it, and to one with `build:read`; to others it is `already_exists`, as for another request. |
| `build:read` | `GetBuild`, `ListBuilds`, `StreamBuildLogs`, `GetTenantQuotas`, `GetBuildStats`; `GetBuildStatus`, `GetBuildLogs` |
| `build:cancel` | `CancelBuild`; `DeleteBuild` with `force` of a build that has not ended, beside `build:delete` |
| `build:delete` | `DeleteBuild` |
| `artifact:read` | `GetBuildArtifact` |
";

/// `cargo xtask docs`
pub(crate) fn run() -> Result<()> {
    std::fs::write(workspace::top().join(PAGE), page()?)?;
    println!("wrote {PAGE}");
    Ok(())
}

fn page() -> Result<String> {
    Ok(render(&std::fs::read_to_string(workspace::top().join(PROTO))?))
}

/// A small reader for the one file whose form is ours: a statement a line, comments above.
fn render(proto: &str) -> String {
    let mut page = String::from(HEAD);
    let mut comment: Vec<&str> = Vec::new();
    let mut oneof = None;
    for line in proto.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("//") {
            comment.push(text.trim());
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let said = comment.join(" ");
        match words[..] {
            ["service" | "message" | "enum", name, ..] => section(&mut page, &words, name, &said),
            ["rpc", ..] => rpc(&mut page, line, &said),
            ["oneof", name, ..] => oneof = Some(name.to_owned()),
            ["}"] => oneof = None,
            ["option" | "syntax" | "package" | "import", ..] | [] => {}
            _ => field(&mut page, &words, oneof.as_deref(), &said),
        }
        comment.clear();
    }
    page
}

fn section(page: &mut String, words: &[&str], name: &str, said: &str) {
    let heads = match words[0] {
        "service" => "| procedure | request | answer | |\n|---|---|---|---|",
        "enum" => "| value | number | |\n|---|---:|---|",
        _ => "| field | number | type | |\n|---|---:|---|---|",
    };
    let said = if said.is_empty() { String::new() } else { format!("{said}\n\n") };
    let empty = words.last() == Some(&"{}");
    let heads = if empty { "" } else { heads };
    // Writing to a String cannot fail.
    let _ = write!(page, "\n## {name}\n\n{said}{heads}\n");
}

fn rpc(page: &mut String, line: &str, said: &str) {
    let parts: Vec<&str> = line.split(['(', ')']).map(str::trim).collect();
    if let [name, request, _, answer, ..] = parts[..] {
        let name = name.trim_start_matches("rpc ");
        let _ = writeln!(page, "| `{name}` | `{request}` | `{answer}` | {said} |");
    }
}

fn field(page: &mut String, words: &[&str], oneof: Option<&str>, said: &str) {
    let Some(equals) = words.iter().position(|word| *word == "=") else { return };
    let (before, number) = (&words[..equals], words[equals + 1].trim_end_matches(';'));
    let Some((name, kind)) = before.split_last() else { return };
    if kind.is_empty() {
        let _ = writeln!(page, "| `{name}` | {number} | {said} |");
        return;
    }
    let choice = oneof.map(|oneof| format!("one of `{oneof}`. ")).unwrap_or_default();
    let _ = writeln!(page, "| `{name}` | {number} | {} | {choice}{said} |", kind.join(" "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_what_the_proto_file_says() {
        let written = std::fs::read_to_string(workspace::top().join(PAGE)).unwrap_or_default();
        assert!(written == page().unwrap(), "run `cargo xtask docs`");
    }

    #[test]
    fn comments_become_the_last_column() {
        let page = render("// What.\nmessage A {\n  // Why.\n  map<string, B> c = 7;\n}\n");
        assert!(page.ends_with(
            "## A\n\nWhat.\n\n| field | number | type | |\n|---|---:|---|---|\n\
             | `c` | 7 | map<string, B> | Why. |\n"
        ));
    }
}
