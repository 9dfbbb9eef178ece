//! Generates the messages and the service trait from `proto/`, the descriptors for reflection,
//! and the tables of `names`.

use std::error::Error;
use std::fmt::Write as _;
use std::path::PathBuf;

use protox::Compiler;

const PROTO_DIR: &str = "../../proto";
const SERVICE_FILE: &str = "builder/v1/builder.proto";
/// What reflection shows beside it; its code comes with a library.
const HEALTH_FILE: &str = "grpc/health/v1/health.proto";

#[expect(clippy::disallowed_methods, reason = "cargo tells a build script where to write")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO_DIR}");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);

    let commented = out.join("commented.bin");
    std::fs::write(&commented, compile(true)?.encode_file_descriptor_set())?;
    connectrpc_build::Config::new()
        .descriptor_set(&commented)
        .files(&[SERVICE_FILE])
        .include_file("_connectrpc.rs")
        .gate_client_feature(true)
        .emit_rerun_directives(false)
        .compile()?;

    let plain = compile(false)?;
    std::fs::write(out.join("descriptors.bin"), plain.encode_file_descriptor_set())?;
    std::fs::write(out.join("names.rs"), names(&plain)?)?;
    Ok(())
}

fn compile(with_comments: bool) -> Result<Compiler, Box<dyn Error>> {
    let mut compiler = Compiler::new([PROTO_DIR])?;
    compiler.include_imports(true).include_source_info(with_comments);
    compiler.open_files([SERVICE_FILE, HEALTH_FILE])?;
    Ok(compiler)
}

/// The tables of `src/names.rs`, read off the descriptors.
fn names(compiler: &Compiler) -> Result<String, Box<dyn Error>> {
    let set = compiler.file_descriptor_set();
    let file = set.file.iter().find(|file| file.name() == SERVICE_FILE).ok_or("no such file")?;
    let package = file.package();
    let mut text =
        String::from("/// Every message of the package.\npub static MESSAGES: &[Message] = &[\n");
    for message in &file.message_type {
        writeln!(text, "Message {{ name: \"{package}.{}\", fields: &[", message.name())?;
        for field in &message.field {
            let entry = message.nested_type.iter().find(|nested| {
                field.type_name().rsplit('.').next() == Some(nested.name())
                    && nested.options.as_ref().is_some_and(|options| options.map_entry())
            });
            let kind = match entry {
                Some(_) => "Kind::Map".to_owned(),
                None => kind(field.r#type.unwrap_or_default(), field.type_name()),
            };
            let repeated = entry.is_none() && field.label == Some(3);
            writeln!(
                text,
                "Field {{ name: {:?}, json_name: {:?}, kind: {kind}, is_repeated: {repeated} }},",
                field.name(),
                field.json_name(),
            )?;
        }
        text.push_str("] },\n");
    }
    text.push_str("];\n/// Every enum of the package.\npub static ENUMS: &[Enum] = &[\n");
    for listed in &file.enum_type {
        writeln!(text, "Enum {{ name: \"{package}.{}\", words: &[", listed.name())?;
        for value in &listed.value {
            writeln!(text, "{:?},", value.name())?;
        }
        text.push_str("] },\n");
    }
    text.push_str("];\n/// Every method of the service.\npub static METHODS: &[Method] = &[\n");
    for method in file.service.iter().flat_map(|service| &service.method) {
        let level = method.options.as_ref().and_then(|options| options.idempotency_level);
        writeln!(
            text,
            "Method {{ name: {:?}, input: {:?}, output: {:?}, streams: {}, is_safe: {} }},",
            method.name(),
            method.input_type().trim_start_matches('.'),
            method.output_type().trim_start_matches('.'),
            method.server_streaming(),
            level == Some(1),
        )?;
    }
    text.push_str("];\n");
    Ok(text)
}

/// The kind of a field from its type's number in `descriptor.proto`.
fn kind(type_number: i32, type_name: &str) -> String {
    match type_number {
        3 | 4 | 6 | 16 | 18 => "Kind::Number64".to_owned(),
        1 | 2 | 5 | 7 | 13 | 15 | 17 => "Kind::Number".to_owned(),
        8 => "Kind::Bool".to_owned(),
        // A well-known type has a JSON form of its own.
        11 if type_name.starts_with(".google.protobuf.") => "Kind::Text".to_owned(),
        11 => format!("Kind::Message({:?})", type_name.trim_start_matches('.')),
        14 => format!("Kind::Enum({:?})", type_name.trim_start_matches('.')),
        _ => "Kind::Text".to_owned(),
    }
}
