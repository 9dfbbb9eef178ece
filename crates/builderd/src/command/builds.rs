//! `builderd builds …`: builds of a server, over its public API.

use std::convert::Infallible;
use std::future::Future;
use std::io::{IsTerminal as _, Read as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::args::CompressionArg;
use super::client::{CallError, Client, Patience};
use super::service_args::{
    BuildsArgs, BuildsCommand, CreateArgs, CredentialArgs, FormatArgs, StateArg,
};
use super::{Failure, download, text};

/// Builds on one page of a list.
const PAGE: u32 = 200;
/// Tries to take up a log that was cut, without a line in between: about a minute and a half.
const LOG_TRIES: u32 = 20;
/// How often progress is asked for.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

pub(super) fn run(args: &BuildsArgs) -> Result<(), Failure> {
    let client = Client::new(&args.server)?;
    block_on(command(&client, &args.command))
}

/// Runs what waits for a server, until it is done or the user has had enough.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::ours)?;
    runtime.block_on(async {
        tokio::select! {
            result = work => result,
            _ = tokio::signal::ctrl_c() => {
                let error = "interrupted; what was asked of the server goes on".into();
                Err(Failure { code: 130, error, hint: None })
            }
        }
    })
}

async fn command(client: &Client, command: &BuildsCommand) -> Result<(), Failure> {
    match command {
        BuildsCommand::Create(args) => create(client, args).await,
        BuildsCommand::Get { id, format } => {
            let answer = client.call("GetBuild", &json!({"buildId": id})).await?;
            match format.is_json() {
                true => put!("{}", answer["build"]),
                false => show(&answer["build"]),
            }
            Ok(())
        }
        BuildsCommand::List { state, limit, format } => list(client, state, *limit, format).await,
        BuildsCommand::Logs { id, follow, from, format } => {
            let print = |line: &Value| match format.is_json() {
                true => put!("{line}"),
                false => put!("{}", line_text(line)),
            };
            Ok(log(client, id, *from, *follow, print).await?)
        }
        BuildsCommand::Cancel { id, reason, format } => {
            let request = json!({"buildId": id, "reason": reason});
            let answer = client.call("CancelBuild", &request).await?;
            match format.is_json() {
                true => put!("{answer}"),
                false => put!("{id} {}", state(&answer)),
            }
            Ok(())
        }
        BuildsCommand::Delete { id, force, format } => {
            let request = json!({"buildId": id, "force": force});
            let answer = client.call("DeleteBuild", &request).await?;
            match format.is_json() {
                true => put!("{answer}"),
                false => put!("{id} deleted"),
            }
            Ok(())
        }
        BuildsCommand::Download { id, output } => download::run(client, id, output).await,
        BuildsCommand::Retry { id, credentials, follow, format } => {
            retry(client, id, credentials, *follow, format).await
        }
    }
}

async fn create(client: &Client, args: &CreateArgs) -> Result<(), Failure> {
    let mut image = json!({"imageUri": args.image});
    if let Some(auth) = credentials(&args.credentials)? {
        image["auth"] = auth;
    }
    let mut rootfs = Map::new();
    if let Some(compression) = args.compression {
        let name = match compression {
            CompressionArg::None => "none",
            CompressionArg::Gzip => "gzip",
            CompressionArg::Zstd => "zstd",
        };
        rootfs.insert("compression".into(), name.into());
    }
    if let Some(bytes) = args.size_limit {
        // 64-bit numbers are strings in proto3's JSON.
        rootfs.insert("sizeLimitBytes".into(), bytes.to_string().into());
    }
    let mut config = json!({
        "source": {"dockerImage": image},
        "target": {"microvmRootfs": rootfs},
        "strategy": {"dockerExtract": {}},
        "labels": args.label.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "idempotencyKey": args.idempotency_key.clone().unwrap_or_else(new_key),
    });
    if let Some(name) = &args.name {
        config["buildName"] = name.as_str().into();
    }
    if let Some(tier) = args.tier {
        let tier = format!("TENANT_TIER_{}", tier.as_str().to_ascii_uppercase());
        config["tenant"] = json!({"tier": tier});
    }
    order(client, config, args.follow, &args.format).await
}

fn new_key() -> String {
    Uuid::new_v4().to_string()
}

/// Sends a build's config, and follows the build if wanted.
async fn order(
    client: &Client,
    config: Value,
    follow: bool,
    format: &FormatArgs,
) -> Result<(), Failure> {
    let answer = client.call("CreateBuild", &json!({"config": config})).await?;
    let Some(id) = answer["buildId"].as_str() else {
        let problem = "the answer to CreateBuild has no id".to_owned();
        return Err(CallError::Foreign { server: client.server().to_owned(), problem }.into());
    };
    match (format.is_json(), follow) {
        (true, false) => put!("{answer}"),
        (true, true) => {}
        (false, _) => put!("{id}"),
    }
    if !follow {
        return Ok(());
    }
    let build = watch(client, id, format.is_json()).await?;
    if format.is_json() {
        put!("{build}");
    }
    ended(&build)
}

/// Shows a build's log, and its progress on a terminal, until it has ended; gives the build.
async fn watch(client: &Client, id: &str, quiet: bool) -> Result<Value, Failure> {
    let screen = Screen::new(quiet);
    let follow = async {
        log(client, id, 0, true, |line| screen.line(&line_text(line))).await?;
        client.call("GetBuild", &json!({"buildId": id})).await
    };
    let answer = tokio::select! {
        answer = follow => answer?,
        never = show_progress(client, id, &screen) => match never {},
    };
    Ok(answer["build"].clone())
}

/// What is shown while a build is followed.
enum Screen {
    Bar(ProgressBar),
    Lines,
    Nothing,
}

impl Screen {
    fn new(quiet: bool) -> Self {
        if quiet {
            return Self::Nothing;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines;
        }
        let style = ProgressStyle::with_template("{spinner} {bar:30} {pos:>3} % {msg}");
        let bar = ProgressBar::new(100);
        Self::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    fn line(&self, line: &str) {
        match self {
            Self::Bar(bar) => bar.println(line),
            Self::Lines => tell!("{line}"),
            Self::Nothing => {}
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

async fn show_progress(client: &Client, id: &str, screen: &Screen) -> Infallible {
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        if let Screen::Bar(bar) = screen
            && let Ok(answer) = client.call("GetBuild", &json!({"buildId": id})).await
        {
            let build = &answer["build"];
            bar.set_position(build["progressPercent"].as_u64().unwrap_or(0));
            let step = build["currentStep"].as_str().unwrap_or_default();
            bar.set_message(format!("{} {}", state(build), text::printable(step)));
            bar.tick();
        }
    }
}

/// Shows the lines of a log from `from` on. A connection that is cut is taken up behind the last
/// line that came; no line is shown twice or left out.
pub(super) async fn log(
    client: &Client,
    id: &str,
    from: u64,
    follow: bool,
    mut show: impl FnMut(&Value),
) -> Result<(), CallError> {
    let (mut next, mut patience) = (from, Patience::new(LOG_TRIES));
    loop {
        let before = next;
        let error = match log_once(client, id, &mut next, follow, &mut show).await {
            // A server that stops may end a stream early without a word.
            Ok(()) => {
                if !follow || has_ended(client, id).await? {
                    return Ok(());
                }
                CallError::Cut { server: client.server().to_owned() }
            }
            Err(error) if error.may_pass() => error,
            Err(error) => return Err(error),
        };
        if next > before {
            patience.renew();
        }
        if !patience.wait(error.wait()).await {
            return Err(error);
        }
    }
}

async fn log_once(
    client: &Client,
    id: &str,
    next: &mut u64,
    follow: bool,
    show: &mut impl FnMut(&Value),
) -> Result<(), CallError> {
    let mut stream = client.open_log(id, *next, follow).await?;
    while let Some(line) = stream.next().await? {
        if line["heartbeat"].as_bool() == Some(true) {
            continue;
        }
        let offset = number(&line["offset"]);
        if offset >= *next {
            show(&line);
            *next = offset + 1;
        }
    }
    Ok(())
}

async fn has_ended(client: &Client, id: &str) -> Result<bool, CallError> {
    match client.call("GetBuild", &json!({"buildId": id})).await {
        Ok(answer) => Ok(matches!(
            state(&answer["build"]).as_str(),
            "completed" | "failed" | "cancelled" | "timeout"
        )),
        // The stream will say what is wrong.
        Err(error) if error.may_pass() => Ok(false),
        Err(error) => Err(error),
    }
}

/// How a followed build ended, as an exit code.
fn ended(build: &Value) -> Result<(), Failure> {
    let id = build["buildId"].as_str().unwrap_or_default();
    let failure = &build["failure"];
    let words = |value: &Value| text::printable(value.as_str().unwrap_or_default());
    match state(build).as_str() {
        "completed" => {
            let (size, sum) = (number(&build["rootfsSizeBytes"]), words(&build["rootfsChecksum"]));
            tell!("completed: {}, sha256 {sum}", text::bytes(size));
            tell!("fetch it with: builderd builds download {id} -o rootfs.ext4");
            Ok(())
        }
        "cancelled" => {
            Err(Failure { code: 1, error: "the build was cancelled".into(), hint: None })
        }
        other => {
            let code = match (failure["code"].as_str(), failure["blame"].as_str()) {
                (Some("STORAGE_FULL"), _) => 5,
                (_, Some("yours")) => 3,
                (_, Some("upstream")) => 4,
                _ => 1,
            };
            let cause = match failure["cause"].as_str() {
                Some(_) => format!("{} in {}", words(&failure["cause"]), words(&failure["step"])),
                None => words(&build["errorMessage"]),
            };
            let remedy = words(&failure["remedy"]);
            let hint = Some(remedy).filter(|remedy| !remedy.is_empty());
            Err(Failure {
                code,
                error: format!("the build {id} {}: {cause}", verb(other)).into(),
                hint,
            })
        }
    }
}

/// What a build did that ended so.
fn verb(state: &str) -> &str {
    match state {
        "timeout" => "took too long",
        other => other,
    }
}

async fn list(
    client: &Client,
    states: &[StateArg],
    limit: u32,
    format: &FormatArgs,
) -> Result<(), Failure> {
    let filter: Vec<&str> = states.iter().flat_map(|state| wire_states(*state)).copied().collect();
    // To the server's states, who took too long has failed.
    let timeouts = states.contains(&StateArg::Timeout) && !states.contains(&StateArg::Failed);
    let (mut builds, mut page) = (Vec::new(), String::new());
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    while builds.len() < limit {
        let most = usize::try_from(PAGE).unwrap_or(1);
        let size = if timeouts { most } else { (limit - builds.len()).min(most) };
        let mut request = json!({"stateFilter": filter, "pageSize": size, "pageToken": page});
        if states.iter().all(|state| *state == StateArg::Timeout) && timeouts {
            // In the place of the filter; it is a word for one status alone.
            request["status"] = "timeout".into();
        }
        let mut answer = client.call("ListBuilds", &request).await?;
        let Value::Array(mut more) = answer["builds"].take() else { break };
        more.retain(|build| !timeouts || state(build) != "failed");
        builds.extend(more);
        match answer["nextPageToken"].as_str() {
            Some(token) if !token.is_empty() => page = token.to_owned(),
            _ => break,
        }
    }
    builds.truncate(limit);
    if format.is_json() {
        put!("{}", Value::from(builds));
        return Ok(());
    }
    put!("{:<32} {:<11} {:<20} {:>11}  IMAGE", "BUILD", "STATE", "CREATED", "SIZE");
    for build in &builds {
        let word = |value: &Value| text::printable(value.as_str().unwrap_or_default());
        let size = match number(&build["rootfsSizeBytes"]) {
            0 => String::new(),
            bytes => text::bytes(bytes),
        };
        let created = build["createdAt"].as_str().unwrap_or_default();
        let created = text::printable(created.get(..19).unwrap_or(created));
        let image = word(&build["config"]["source"]["dockerImage"]["imageUri"]);
        put!(
            "{:<32} {:<11} {created:<20} {size:>11}  {image}",
            word(&build["buildId"]),
            state(build)
        );
    }
    Ok(())
}

fn wire_states(state: StateArg) -> &'static [&'static str] {
    match state {
        StateArg::Queued => &["BUILD_STATE_PENDING"],
        StateArg::Running => &[
            "BUILD_STATE_PULLING",
            "BUILD_STATE_EXTRACTING",
            "BUILD_STATE_BUILDING",
            "BUILD_STATE_OPTIMIZING",
        ],
        StateArg::Completed => &["BUILD_STATE_COMPLETED"],
        StateArg::Failed | StateArg::Timeout => &["BUILD_STATE_FAILED"],
        StateArg::Cancelled => &["BUILD_STATE_CANCELLED"],
    }
}

/// The state in a word; the status knows of one more than the state, the timeout.
pub(super) fn state(build: &Value) -> String {
    if build["status"] == "BUILD_STATUS_TIMEOUT" {
        return "timeout".into();
    }
    let name = build["state"].as_str().unwrap_or("BUILD_STATE_UNSPECIFIED");
    let word = name.strip_prefix("BUILD_STATE_").unwrap_or(name).to_ascii_lowercase();
    if word == "pending" { "queued".into() } else { text::printable(&word) }
}

/// A 64-bit number, which proto3's JSON writes as a string and leaves out when it is 0.
pub(super) fn number(value: &Value) -> u64 {
    let number = match value.as_str() {
        Some(text) => text.parse().ok(),
        None => value.as_u64(),
    };
    number.unwrap_or(0)
}

fn line_text(line: &Value) -> String {
    let word = |name: &str| text::printable(line[name].as_str().unwrap_or_default());
    let (time, level) = (word("timestamp"), word("level"));
    let time = time.get(11..19).unwrap_or_default();
    format!("{time} {level:<5} {:<9} {}", word("component"), word("message"))
}

fn show(build: &Value) {
    let row = |name: &str, value: &str| {
        if !value.is_empty() {
            put!("{name:<11} {}", text::printable(value));
        }
    };
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    row("build", &word(&build["buildId"]));
    row("name", &word(&build["config"]["buildName"]));
    row("image", &word(&build["config"]["source"]["dockerImage"]["imageUri"]));
    row("digest", &word(&build["imageMetadata"]["imageDigest"]));
    let percent = build["progressPercent"].as_u64().unwrap_or(0);
    row("state", &format!("{}, {percent} %", state(build)));
    row("step", &word(&build["currentStep"]));
    for (name, key) in
        [("created", "createdAt"), ("started", "startedAt"), ("ended", "completedAt")]
    {
        row(name, &word(&build[key]));
    }
    match number(&build["rootfsSizeBytes"]) {
        0 => {}
        bytes => row("size", &text::bytes(bytes)),
    }
    row("sha256", &word(&build["rootfsChecksum"]));
    row("stored as", &word(&build["rootfsPath"]));
    row("reason", &word(&build["cancelReason"]));
    if build["nextAttemptAt"].is_string() {
        // Until when it waits is its step; this is why.
        let last = build["attempts"].as_array().and_then(|attempts| attempts.last());
        let failure = &last.unwrap_or(&Value::Null)["failure"];
        row("last try", &format!("{}: {}", word(&failure["code"]), word(&failure["cause"])));
    }
    let failure = &build["failure"];
    row("failure", &word(&failure["code"]));
    row("cause", &word(&failure["cause"]));
    row("remedy", &word(&failure["remedy"]));
}

/// The build's own config again, with a new key and with the credentials that were given now.
async fn retry(
    client: &Client,
    id: &str,
    args: &CredentialArgs,
    follow: bool,
    format: &FormatArgs,
) -> Result<(), Failure> {
    let mut answer = client.call("GetBuild", &json!({"buildId": id})).await?;
    let build = answer["build"].take();
    let mut config = build["config"].clone();
    let image = &mut config["source"]["dockerImage"];
    let brought =
        |image: &Value| ["auth", "registryAuth"].iter().any(|name| image[*name].is_object());
    let refused = build["failure"]["code"] == "AUTHENTICATION_FAILED";
    let given = credentials(args)?;
    if given.is_none() && (brought(image) || refused) {
        let error = match refused {
            true => "the registry did not accept the first build's credentials",
            false => "the first build brought registry credentials, which are not kept",
        };
        let hint = Some("give them again: --username NAME --password-stdin".to_owned());
        return Err(Failure { code: Failure::USAGE, error: error.into(), hint });
    }
    if let Some(image) = image.as_object_mut() {
        image.remove("auth");
        image.remove("registryAuth");
        image.extend(given.map(|auth| ("auth".to_owned(), auth)));
    }
    if let Some(tenant) = config["tenant"].as_object_mut() {
        // What the server says of a tenant is not for it to be told.
        let whose = ["tenantId", "customerId", "organizationId", "tier"];
        tenant.retain(|name, _| whose.contains(&name.as_str()));
    }
    config["idempotencyKey"] = new_key().into();
    order(client, config, follow, format).await
}

/// Registry credentials as they are sent, if any were given.
fn credentials(args: &CredentialArgs) -> Result<Option<Value>, Failure> {
    if !args.password_stdin {
        return Ok(None);
    }
    let mut secret = String::new();
    std::io::stdin().lock().read_to_string(&mut secret).map_err(Failure::ours)?;
    let secret = secret.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(Failure::usage("--password-stdin: there is nothing on standard input"));
    }
    Ok(Some(match &args.username {
        Some(name) => json!({"username": name, "password": secret}),
        None => json!({"token": secret}),
    }))
}
