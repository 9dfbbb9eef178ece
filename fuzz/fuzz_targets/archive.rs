//! Image archives from anyone: as they come, and with the fuzzer's documents under right digests.
#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use oci::{ClientOptions, Digest, Fetcher, Source};
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().build().expect("a runtime");
}

fuzz_target!(|input: &[u8]| {
    // Each open goes through another thread and back: of the four ways one is tried.
    let (docker, tag) = (input.len() & 1 == 1, (input.len() & 2 == 2).then(|| "t".to_owned()));
    for archive in [input, &archive_of(input)] {
        let mut copy = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in memory");
        copy.write_all(archive).expect("memory for the file");
        let (file, tag) = (copy.path().to_path_buf(), tag.clone());
        let source = match docker {
            true => Source::DockerArchive { file, tag },
            false => Source::OciArchive { file, tag },
        };
        RUNTIME.with(|runtime| runtime.block_on(read_as(&source)));
    }
});

/// Opens the archive, resolves its image and reads every layer.
async fn read_as(source: &Source) {
    let mut options = ClientOptions::default();
    // An archive that inflates to more is not worth the fuzzer's time.
    options.limits.spool_bytes_max = 16 << 20;
    let spool = std::path::Path::new("/dev/shm");
    let Ok(fetcher) = Fetcher::open(source, &options, spool).await else { return };
    let platform = "linux/amd64".parse().expect("a platform");
    let Ok(image) = fetcher.resolve(&platform).await else { return };
    for layer in &image.layers {
        let Ok(mut blob) = fetcher.blob(&image, layer).await else { continue };
        let mut bytes = Vec::new();
        let whole = loop {
            match blob.next().await {
                Ok(Some(chunk)) => bytes.extend(chunk),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        assert!(!whole || Digest::of(&bytes) == layer.digest, "unverified bytes were handed out");
    }
}

/// Each line is a document, filed under its digest. In it `@N` stands for the digest of line N
/// before it, `%N` for the digest's letters, `#N` for its size. The last is the index of a layout,
/// the one before it the list of a `docker save` archive.
fn archive_of(script: &[u8]) -> Vec<u8> {
    let mut documents: Vec<(Digest, Vec<u8>)> = Vec::new();
    for line in script.split(|byte| *byte == b'\n') {
        let mut document = Vec::new();
        let mut bytes = line.iter().copied();
        while let Some(byte) = bytes.next() {
            let named = matches!(byte, b'@' | b'%' | b'#').then(|| bytes.clone().next()).flatten();
            let number = named.and_then(|digit| char::from(digit).to_digit(10));
            let Some((digest, other)) = number.and_then(|n| documents.get(n as usize)) else {
                document.push(byte);
                continue;
            };
            bytes.next();
            let text = match byte {
                b'@' => digest.to_string(),
                b'%' => digest.hex(),
                _ => other.len().to_string(),
            };
            document.extend(text.into_bytes());
        }
        documents.push((Digest::of(&document), document));
    }
    let mut tar = fuzz::file(b"oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    for (digest, document) in &documents {
        tar.extend(fuzz::file(format!("blobs/sha256/{}", digest.hex()).as_bytes(), document));
    }
    for (name, (_, document)) in ["index.json", "manifest.json"].iter().zip(documents.iter().rev())
    {
        tar.extend(fuzz::file(name.as_bytes(), document));
    }
    tar
}
