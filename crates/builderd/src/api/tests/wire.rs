//! What the doors say in JSON: spellings, states, errors, limits, development mode.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Server, create_body, send};
use crate::api::Mode;
use crate::build::record::{BuildMetrics, Failure, FailureCode, Isolation, LiveUsage, Micros};
use crate::clock::{Clock as _, WallClock};
use crate::store::Outcome;
use crate::tenant::{Right, Tier};

#[tokio::test]
async fn a_build_from_its_creation_to_its_deletion() {
    let server = Server::start(Mode::Development).await;
    let created = send(server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "t")).await;
    let created = created.well();
    assert_eq!(created["status"], "BUILD_STATUS_QUEUED");
    assert_eq!(created["state"], "BUILD_STATE_PENDING");
    assert_eq!(created["buildId"], created["build_id"]);
    let id = created["build_id"].as_str().unwrap();
    let ask =
        |method: &str| server.rpc(method, &json!({"build_id": id})).header("x-tenant-id", "t");

    let claimed = server.claim().await;
    server.log(&claimed, &["first", "second"]).await;
    server.complete(&claimed, b"an image", "none").await;
    let build = send(ask("GetBuild")).await.well()["build"].clone();
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED");
    assert_eq!(build["rootfs_size_bytes"], 8);
    assert_eq!(build["rootfsSizeBytes"], "8");
    assert_eq!(build["metrics"]["compressionRatio"], "50");
    assert_eq!(build["progress"]["stage"], "DONE");
    assert_eq!(build["resource_usage"]["cpu_usage_percent"], 75);
    assert_eq!(build["tenant_context"]["tier"], "TENANT_TIER_ENTERPRISE");
    assert_eq!(build["image_metadata"]["original_image"], "nginx:alpine");
    let tail = build["build_logs"].as_array().unwrap();
    assert!(tail.ends_with(&[json!("first"), json!("second")]), "{tail:?}");
    let path = build["rootfs_path"].as_str().unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"an image");

    let cancelled = send(ask("CancelBuild")).await.well();
    assert_eq!(cancelled["status"], "BUILD_STATUS_COMPLETED", "an ended build stays");
    assert_eq!(cancelled["success"], false);
    assert_eq!(send(ask("DeleteBuild")).await.well()["success"], true);
    let gone = send(ask("GetBuild")).await;
    assert_eq!(gone.status, StatusCode::NOT_FOUND);
    assert_eq!(gone.json()["message"], format!("build not found: {id}"));
    server.stop().await;
}

#[tokio::test]
async fn a_running_build_shows_what_it_takes_and_a_failed_one_what_it_took() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let get = || send(server.rpc("GetBuild", &json!({"build_id": id})).header("x-tenant-id", "t"));
    let claimed = server.claim().await;
    let lease = server.store.lease(&claimed.lease);
    let begun = get().await.well()["build"].clone();
    assert!(begun["resource_usage"].is_null() && begun["metrics"].is_null(), "{begun:#}");
    let so_far = BuildMetrics {
        pull_ms: 40,
        total_ms: 2000,
        source_bytes: 9000,
        fetched_bytes: 5000,
        memory_peak_bytes: 80 << 20,
        disk_bytes: 3 << 20,
        cpu_ms: 2500,
        isolation: Some(Isolation {
            sandbox: "build_1-1".into(),
            walls: vec!["cgroup".into(), "seccomp".into()],
        }),
        ..BuildMetrics::default()
    };
    let usage = LiveUsage { memory_bytes: 64 << 20, cpu_percent: 175, disk_bytes: 2 << 20, so_far };
    lease.heartbeat(60, Some(&usage), claimed.build.updated_at).await.unwrap();
    let running = get().await.well()["build"].clone();
    let taken = &running["resource_usage"];
    assert_eq!(taken["memory_used_bytes"], 64 << 20);
    assert_eq!(taken["cpu_usage_percent"], 175);
    assert_eq!(taken["disk_used_bytes"], 2 << 20);
    assert_eq!(taken["downloaded_bytes"], 5000);
    assert_eq!(running["resourceUsage"]["downloadedBytes"], "5000");
    assert_eq!(begun["isolation"], json!(null));
    assert_eq!(running["isolation"]["sandbox_id"], "build_1-1");
    assert_eq!(running["isolation"]["security_contexts"], json!(["cgroup", "seccomp"]));
    let metrics = &running["metrics"];
    assert_eq!(
        (&metrics["pull_duration_ms"], &metrics["total_duration_ms"]),
        (&json!(40), &json!(2000))
    );
    assert_eq!(metrics["original_size_bytes"], 9000);
    assert_eq!(metrics["memory_peak_bytes"], 80 << 20);
    assert_eq!(
        (&metrics["disk_usage_bytes"], &metrics["cpu_cores_used"]),
        (&json!(3 << 20), &json!(2))
    );
    assert_eq!(
        (&metrics["rootfs_size_bytes"], &metrics["compression_ratio"]),
        (&json!(0), &json!(0))
    );

    let failure = Failure {
        code: FailureCode::NetworkError,
        step: "layers".into(),
        cause: "the registry hung up".into(),
        blame: "upstream".into(),
        remedy: String::new(),
    };
    lease.finish(None, Outcome::Failed(failure), WallClock.now()).await.unwrap();
    let failed = get().await.well()["build"].clone();
    let taken = &failed["resource_usage"];
    assert_eq!(taken["memory_used_bytes"], 80 << 20, "the most, now that it takes nothing");
    assert_eq!(
        (&taken["cpu_usage_percent"], &taken["disk_used_bytes"]),
        (&json!(125), &json!(3 << 20))
    );
    assert_eq!(failed["metrics"]["total_duration_ms"], 2000);
    server.stop().await;
}

#[tokio::test]
async fn programs_get_canonical_json_and_nothing_else() {
    let server = Server::start(Mode::Development).await;
    let request = server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "t");
    let created = send(request.header("connect-protocol-version", "1")).await.well();
    let names: Vec<&str> = created.as_object().unwrap().keys().map(String::as_str).collect();
    assert!(names.iter().all(|name| !name.contains('_')), "{names:?}");
    let limits = &created["tenantContext"]["resourceLimits"];
    assert_eq!(limits["maxMemoryBytes"], Tier::Enterprise.limits().memory_bytes.to_string());
    let reply = send(
        server
            .rpc("GetBuild", &json!({"buildId": "build_0"}))
            .header("x-tenant-id", "t")
            .header("connect-protocol-version", "1"),
    );
    let error = reply.await.json();
    let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["code", "details", "message"]);
    server.stop().await;
}

#[tokio::test]
async fn unknown_names_are_ignored_and_camel_case_is_taken() {
    let server = Server::start(Mode::Development).await;
    let body = json!({"config": {
        "tenant": {
            "tenantId": "t1", "customerId": "c1", "organizationId": "o1", "tier": "TENANT_TIER_PRO",
        },
        "source": {"dockerImage": {"imageUri": "docker.io/library/nginx:alpine", "novelty": 1}},
        "target": {"microvmRootfs": {"initStrategy": "INIT_STRATEGY_DIRECT", "novelty": "NEW"}},
        "strategy": {"dockerExtract": {"flattenFilesystem": true}},
        "labels": {"camelKey": "x", "snake_key": "y"},
        "novelty": {"a": []},
    }});
    let created = send(server.rpc("CreateBuild", &body)).await.well();
    assert_eq!(created["tenant_context"]["tier"], "TENANT_TIER_PRO");
    assert_eq!(created["tenant_context"]["customer_id"], "c1");
    assert_eq!(created["tenant_context"]["organization_id"], "o1");
    let all = Right::ALL.map(Right::as_str);
    assert_eq!(
        created["tenant_context"]["permissions"],
        json!(all),
        "development mode asks nobody"
    );
    let asked = json!({"build_id": created["build_id"], "tenant_id": "t1"});
    let config = send(server.rpc("GetBuild", &asked)).await.well()["build"]["config"].clone();
    assert_eq!(config["labels"], json!({"camelKey": "x", "snake_key": "y"}));
    assert_eq!(config["source"]["docker_image"]["image_uri"], "docker.io/library/nginx:alpine");
    server.stop().await;
}

#[tokio::test]
async fn development_mode_takes_the_tenant_from_wherever_it_is_named() {
    let server = Server::start(Mode::Development).await;
    let reply = send(server.rpc("CreateBuild", &create_body())).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    assert_eq!(reply.json()["message"], "tenant ID is required");
    assert_eq!(reply.json()["error"]["code"], "AUTHENTICATION_REQUIRED");

    let mut body = create_body();
    body["config"]["tenant"] = json!({"tenant_id": "body", "tier": "TENANT_TIER_DEDICATED"});
    let other = send(server.rpc("CreateBuild", &body).header("x-tenant-id", "header")).await;
    assert_eq!(other.status, StatusCode::FORBIDDEN);
    let odd = send(server.rpc("CreateBuild", &body).header("x-tenant-id", "../odd")).await;
    assert_eq!(odd.status, StatusCode::BAD_REQUEST);
    send(server.rpc("CreateBuild", &body)).await.well();

    // The tier is remembered, and so quotas tell the truth.
    let quotas = send(server.rpc("GetTenantQuotas", &json!({"tenant_id": "body"}))).await.well();
    let limits = Tier::Dedicated.limits();
    assert_eq!(quotas["current_limits"]["max_daily_builds"], limits.daily_builds);
    assert_eq!(quotas["current_usage"]["daily_builds_used"], 1);
    assert_eq!(quotas["current_usage"]["builds_queued"], 1);
    let stats = send(server.rpc("GetBuildStats", &json!({"tenant_id": "body"}))).await.well();
    assert_eq!(stats["total_builds"], 1);
    assert_eq!(stats["recent_builds"].as_array().unwrap().len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn the_daily_quota_answers_as_documented() {
    let server = Server::start_with(Mode::Development, Tier::Free).await;
    for _ in 0..Tier::Free.limits().daily_builds {
        server.create("tenant-123").await;
    }
    let ask = || server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "tenant-123");
    let program = send(ask().header("connect-protocol-version", "1")).await;
    assert_eq!(program.status, StatusCode::TOO_MANY_REQUESTS, "as Connect has it");
    assert_eq!(program.json()["code"], "resource_exhausted");
    let reply = send(ask()).await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN, "as the documentation has it");
    let body = reply.json();
    assert_eq!(body["code"], "resource_exhausted");
    assert_eq!(body["details"][0]["type"], "builder.v1.ErrorDetail");
    let error = &body["error"];
    assert_eq!(error["code"], "QUOTA_EXCEEDED");
    assert_eq!(error["message"], "Daily build limit exceeded: 5/5");
    assert_eq!(error["details"]["tenant_id"], "tenant-123");
    assert_eq!(error["details"]["quota_type"], "daily_builds");
    assert_eq!((&error["details"]["current"], &error["details"]["limit"]), (&json!(5), &json!(5)));
    let reset = error["details"]["reset_time"].as_str().unwrap();
    assert!(reset.ends_with("T00:00:00Z"), "{reset}");
    server.stop().await;
}

#[tokio::test]
async fn plain_routes_answer_in_the_documented_words() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let ask = |route: &str| send(server.plain(route).header("x-tenant-id", "t"));
    let status = ask(&format!("GetBuildStatus/{id}")).await.well();
    assert_eq!(
        (&status["build_id"], &status["status"]),
        (&json!(id), &json!("BUILD_STATUS_QUEUED"))
    );
    assert_eq!(status["progress"]["percentage"], 0);
    assert!(status.get("buildId").is_none());

    for route in ["GetBuildStatus/build_0", "GetBuildArtifact/x", "GetBuildLogs/%2e%2e%2f"] {
        let reply = ask(route).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{route}");
        assert_eq!(reply.json()["error"]["code"], "NOT_FOUND", "{route}");
    }
    let early = ask(&format!("GetBuildArtifact/{id}")).await;
    assert_eq!(early.status, StatusCode::CONFLICT);
    assert_eq!(early.json()["error"]["code"], "NOT_READY");

    for query in ["limit=x", "limit=-1", "offset=-1", "status=BUILD_STATUS_ODD"] {
        let reply = ask(&format!("ListBuilds?{query}")).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{query}");
    }
    let second = server.create("t").await;
    let page = ask("ListBuilds?limit=1&status=BUILD_STATUS_QUEUED").await.well();
    assert_eq!((&page["total_count"], &page["has_more"]), (&json!(2), &json!(true)));
    assert_eq!(page["builds"][0]["build_id"], second, "newest first");
    let page = ask("ListBuilds?limit=1&offset=1").await.well();
    assert_eq!((&page["builds"][0]["build_id"], &page["has_more"]), (&json!(id), &json!(false)));
    let page = ask("ListBuilds?status=BUILD_STATUS_COMPLETED").await.well();
    assert_eq!(page, json!({"builds": [], "total_count": 0, "has_more": false}));
    server.stop().await;
}

#[tokio::test]
async fn pages_of_the_rpc_follow_each_other() {
    let server = Server::start(Mode::Development).await;
    let mut made = Vec::new();
    for _ in 0..3 {
        made.insert(0, server.create("t").await);
    }
    let mut token = String::new();
    let mut seen = Vec::new();
    loop {
        let body = json!({"page_size": 2, "page_token": token});
        let page = send(server.rpc("ListBuilds", &body).header("x-tenant-id", "t")).await.well();
        assert_eq!(page["total_count"], 3);
        let builds = page["builds"].as_array().unwrap();
        seen.extend(builds.iter().map(|build| build["build_id"].as_str().unwrap().to_owned()));
        if page["has_more"] == false {
            assert!(page.get("next_page_token").is_none());
            break;
        }
        token = page["next_page_token"].as_str().unwrap().to_owned();
    }
    assert_eq!(seen, made);
    server.stop().await;
}

#[tokio::test]
async fn every_answer_tells_the_rate_and_one_too_many_is_refused() {
    let server = Server::start_with(Mode::Development, Tier::Free).await;
    let (rate, burst) = Tier::Free.request_rate();
    let list = || send(server.plain("ListBuilds").header("x-tenant-id", "t"));
    let first = list().await;
    assert_eq!(first.header("x-ratelimit-limit"), rate.to_string());
    assert_eq!(first.header("x-ratelimit-remaining"), (burst - 1).to_string());
    assert!(first.header("x-ratelimit-reset").parse::<u64>().unwrap() > 1_700_000_000);
    let mut refused = first;
    for _ in 0..3 * burst {
        refused = list().await;
        if refused.status != StatusCode::OK {
            break;
        }
    }
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("x-ratelimit-remaining"), "0");
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(refused.json()["error"]["code"], "RATE_LIMITED");
    let other = send(server.plain("ListBuilds").header("x-tenant-id", "other")).await;
    assert_eq!(other.status, StatusCode::OK);
    server.stop().await;
}

#[tokio::test]
async fn health_stats_and_metrics_answer_as_documented() {
    let server = Server::start(Mode::Tokens).await;
    let get = |path: &'static str| send(server.request(Method::GET, path));
    let health = get("/health").await.well();
    assert_eq!((&health["status"], &health["service"]), (&json!("ok"), &json!("builderd")));
    assert!(health["uptime_seconds"].is_i64() && health["version"].is_string());
    let stats = get("/stats").await.well();
    assert_eq!(stats["builds"], json!({"queued": 0, "running": 0}));
    let metrics = get("/metrics").await;
    assert_eq!(metrics.header("content-type"), "text/plain; version=0.0.4");
    assert_eq!(metrics.body, b"builderd_up 1\n");
    let mut limited = None;
    for _ in 0..500 {
        let reply = get("/health").await;
        if reply.status == StatusCode::TOO_MANY_REQUESTS {
            limited = Some(reply);
            break;
        }
    }
    // A machine that is too slow to exceed 100 requests a second cannot show it.
    if let Some(reply) = limited {
        assert_eq!(reply.json(), json!({"error": "rate limit exceeded", "status": 429}));
        assert_eq!(reply.header("x-ratelimit-limit"), "100");
        assert_eq!(reply.header("retry-after"), "1");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_same_idempotency_key_makes_one_build() {
    let server = Server::start(Mode::Tokens).await;
    let token = server.token("t", &Right::ALL).await;
    let create = |body: &Value, key: &str| {
        send(server.rpc("CreateBuild", body).bearer_auth(&token).header("idempotency-key", key))
    };
    let first = create(&create_body(), "k").await.well();
    let second = create(&create_body(), "k").await.well();
    assert_eq!(first["build_id"], second["build_id"]);
    let mut other = create_body();
    other["config"]["build_name"] = json!("another");
    let reply = create(&other, "k").await;
    assert_eq!(reply.status, StatusCode::CONFLICT);
    assert_eq!(reply.json()["code"], "already_exists");

    // The field says what the header says.
    let mut named = create_body();
    named["config"]["idempotency_key"] = json!("k");
    let bare = |body: &Value| send(server.rpc("CreateBuild", body).bearer_auth(&token));
    for again in [bare(&named).await, create(&named, "k").await, create(&named, "").await] {
        assert_eq!(again.well()["build_id"], first["build_id"]);
    }
    let reply = create(&named, "l").await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    let message = reply.json()["message"].as_str().unwrap().to_owned();
    for part in ["config.idempotency_key", "Idempotency-Key", "\"k\"", "\"l\""] {
        assert!(message.contains(part), "{message}");
    }
    named["config"]["idempotency_key"] = json!("field first");
    let (by_field, by_header) = (bare(&named).await, create(&create_body(), "field first").await);
    assert_eq!(by_field.well()["build_id"], by_header.well()["build_id"]);
    server.stop().await;
}

#[tokio::test]
async fn credentials_of_a_registry_are_shown_nowhere() {
    let server = Server::start(Mode::Development).await;
    let mut body = create_body();
    let auth = json!({"username": "canary-user", "password": "canary-password"});
    body["config"]["source"]["docker_image"]["registry_auth"] = auth;
    let created = send(server.rpc("CreateBuild", &body).header("x-tenant-id", "t")).await;
    assert!(!String::from_utf8_lossy(&created.body).contains("canary"));
    let id = created.well()["build_id"].as_str().unwrap().to_owned();
    let ask = json!({ "build_id": id });
    let job = send(server.rpc("GetBuild", &ask).header("x-tenant-id", "t")).await;
    assert!(!String::from_utf8_lossy(&job.body).contains("canary"));
    let listed = send(server.plain("ListBuilds").header("x-tenant-id", "t")).await;
    assert!(!String::from_utf8_lossy(&listed.body).contains("canary"));
    server.stop().await;
}

#[tokio::test]
async fn a_queued_build_is_cancelled_and_a_running_one_is_told() {
    let server = Server::start(Mode::Development).await;
    let cancel = |id: &str| {
        let body = json!({"build_id": id, "reason": "User cancellation"});
        send(server.rpc("CancelBuild", &body).header("x-tenant-id", "t"))
    };
    let queued = server.create("t").await;
    let done = cancel(&queued).await.well();
    assert_eq!(
        (&done["success"], &done["status"]),
        (&json!(true), &json!("BUILD_STATUS_CANCELLED"))
    );
    let get = server.rpc("GetBuild", &json!({ "build_id": queued }));
    let build = send(get.header("x-tenant-id", "t")).await.well()["build"].take();
    assert_eq!(build["cancel_reason"], "User cancellation");
    let running = server.create("t").await;
    let claimed = server.claim().await;
    assert_eq!(claimed.lease.build().as_str(), running);
    let told = cancel(&running).await.well();
    assert_eq!((&told["success"], &told["state"]), (&json!(true), &json!("BUILD_STATE_PULLING")));
    let heard =
        server.store.lease(&claimed.lease).heartbeat(60, None, claimed.build.updated_at).await;
    let reason = "User cancellation".to_owned();
    assert_eq!(heard.unwrap(), crate::store::Heartbeat::Cancel { reason });
    let delete = server.rpc("DeleteBuild", &json!({ "build_id": running }));
    let refused = send(delete.header("x-tenant-id", "t")).await;
    assert_eq!(refused.json()["code"], "failed_precondition");
    server.stop().await;
}

#[tokio::test]
async fn what_would_be_missed_if_it_were_passed_over_is_refused() {
    let server = Server::start(Mode::Development).await;
    server.create("t").await;
    let named = |request: reqwest::RequestBuilder| request.header("x-tenant-id", "t");
    for name in ["x-tenant-id", "x-customer-id", "authorization"] {
        let request = server.plain("ListBuilds").header(name, "t").header(name, "other");
        let reply = send(request).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{name}");
        let message = reply.json()["error"]["message"].to_string();
        assert!(message.contains(name) && message.contains("more than once"), "{message}");
    }
    for query in ["page_token=build_x", "state_filter=BUILD_STATE_FAILED"] {
        let reply = send(named(server.plain(&format!("ListBuilds?{query}")))).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{query}");
    }
    let page = send(named(server.plain("ListBuilds?page_size=1"))).await.well();
    assert_eq!(page["builds"].as_array().unwrap().len(), 1);
    for (method, body, word) in
        [("GetBuild", json!({}), "build_id"), ("CancelBuild", json!({"build_id": ""}), "build_id")]
    {
        let reply = send(named(server.rpc(method, &body))).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{method}");
        assert!(reply.json()["message"].to_string().contains(word), "{}", reply.json());
    }
    server.stop().await;
}

#[tokio::test]
async fn the_newest_builds_of_a_stretch_of_time_are_of_that_time() {
    let server = Server::start(Mode::Development).await;
    server.create("t").await;
    let recent = async |body: Value| {
        let request = server.rpc("GetBuildStats", &body).header("x-tenant-id", "t");
        let stats = send(request).await.well();
        assert_eq!(stats["total_builds"], stats["recent_builds"].as_array().unwrap().len());
        stats["total_builds"].as_u64().unwrap()
    };
    assert_eq!(recent(json!({})).await, 1);
    assert_eq!(recent(json!({"start_time": "2020-01-01T00:00:00Z"})).await, 1);
    assert_eq!(recent(json!({"end_time": "2999-01-01T00:00:00Z"})).await, 1);
    assert_eq!(recent(json!({"start_time": "2999-01-01T00:00:00Z"})).await, 0);
    assert_eq!(recent(json!({"end_time": "2020-01-01T00:00:00Z"})).await, 0);
    server.stop().await;
}

#[tokio::test]
async fn a_build_that_waits_for_its_next_try_says_until_when() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let shown = async || {
        let get = server.rpc("GetBuild", &json!({ "build_id": id })).header("x-tenant-id", "t");
        send(get).await.well()["build"].take()
    };
    assert!(shown().await.get("next_attempt_at").is_none(), "nothing was tried");
    let claimed = server.claim().await;
    let failure = Failure {
        code: FailureCode::NetworkError,
        step: "resolve".into(),
        cause: "it broke".into(),
        blame: "upstream".into(),
        remedy: "try again later".into(),
    };
    // 4001-01-01T00:00:00.5Z
    let run_at = Micros(64_092_211_200_500_000);
    let outcome = Outcome::Retry { failure: Some(failure), run_at };
    server.store.lease(&claimed.lease).finish(None, outcome, WallClock.now()).await.unwrap();
    let waiting = shown().await;
    assert_eq!(waiting["next_attempt_at"], "4001-01-01T00:00:00.500Z");
    let step = "Waiting until 4001-01-01T00:00:01Z for try 2";
    assert_eq!(
        (&waiting["current_step"], &waiting["progress"]["current_step"]),
        (&json!(step), &json!(step))
    );
    let page = send(server.plain("ListBuilds").header("x-tenant-id", "t")).await.well();
    assert_eq!(page["builds"][0]["current_step"], step);
    server.stop().await;
}
