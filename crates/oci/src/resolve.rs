//! From a source to one image of one platform.
//!
//! Walks indexes (nested ones too, within limits), best platform first, skips attestations,
//! and checks manifest against config. It fetches documents through the opened source and
//! knows nothing of HTTP or files.

use bytes::Bytes;

use crate::archive::Selection;
use crate::blob::BlobStream;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::PullError;
use crate::fetch::Store;
use crate::image::{Image, Layer};
use crate::manifest::{Descriptor, Document, ImageIndex, Manifest, ManifestError, essence, shown};
use crate::options::Limits;
use crate::platform::Platform;
use crate::source::Source;

/// Finds the image of `source` for `wanted`.
pub(crate) async fn resolve(
    store: &Store,
    source: &Source,
    limits: &Limits,
    wanted: &Platform,
) -> Result<Image, PullError> {
    let mut walk = Walk {
        store,
        name: source.to_string(),
        limits,
        wanted,
        available: Vec::new(),
        documents: 0,
        index_digest: None,
    };
    match (store, source) {
        (Store::Registry(repository), _) => {
            let fetched = repository.manifest(&repository.reference.selector()).await?;
            let announced = fetched.content_type.as_deref();
            let document = walk.parse(&fetched.bytes, announced)?;
            walk.take_document(document, Some(fetched.digest)).await
        }
        (Store::Layout(layout), Source::Layout { tag, .. }) => {
            walk.take_descriptors(layout.select(tag.as_deref())?).await
        }
        (Store::Archive(archive), source) => {
            let tag = match source {
                Source::OciArchive { tag, .. } | Source::DockerArchive { tag, .. } => tag.clone(),
                Source::Registry(_) | Source::Layout { .. } | Source::Stdin => None,
            };
            match archive.select(tag).await? {
                Selection::Descriptors(descriptors) => walk.take_descriptors(descriptors).await,
                Selection::Docker(saved) => {
                    let (manifest, digest) = (saved.manifest, saved.config_digest);
                    let image = walk.image(&manifest, digest, None).await?;
                    image.ok_or_else(|| walk.no_such_platform())
                }
            }
        }
        (Store::Layout(layout), _) => walk.take_descriptors(layout.select(None)?).await,
    }
}

struct Walk<'a> {
    store: &'a Store,
    name: String,
    limits: &'a Limits,
    wanted: &'a Platform,
    /// Platforms seen on the way, for the error.
    available: Vec<Platform>,
    documents: usize,
    index_digest: Option<Digest>,
}

impl Walk<'_> {
    fn parse(&self, bytes: &[u8], announced: Option<&str>) -> Result<Document, PullError> {
        let parsed = Document::parse(bytes, announced, self.limits.layers_max);
        parsed.map_err(|source| self.refused(source))
    }

    fn refused(&self, source: ManifestError) -> PullError {
        PullError::Manifest { name: self.name.clone(), source }
    }

    fn no_such_platform(&mut self) -> PullError {
        self.available.sort();
        self.available.dedup();
        PullError::NoSuchPlatform {
            name: self.name.clone(),
            wanted: self.wanted.clone(),
            available: std::mem::take(&mut self.available),
        }
    }

    /// From the entries of a layout's `index.json` that were selected.
    async fn take_descriptors(
        &mut self,
        mut selected: Vec<Descriptor>,
    ) -> Result<Image, PullError> {
        if selected.len() == 1
            && let Some(only) = selected.pop()
        {
            let document = self.fetch(&only).await?;
            return self.take_document(document, Some(only.digest)).await;
        }
        self.take_document(Document::Index(ImageIndex { manifests: selected }), None).await
    }

    async fn take_document(
        &mut self,
        document: Document,
        digest: Option<Digest>,
    ) -> Result<Image, PullError> {
        let found = match (document, digest) {
            (Document::Manifest(manifest), Some(digest)) => {
                self.image(&manifest, digest, None).await?
            }
            (Document::Manifest(_), None) => None,
            (Document::Index(index), digest) => {
                self.index_digest = digest;
                self.search(index).await?
            }
        };
        found.ok_or_else(|| self.no_such_platform())
    }

    /// Looks through an index and the indexes in it, best entry first.
    async fn search(&mut self, index: ImageIndex) -> Result<Option<Image>, PullError> {
        let mut stack = self.candidates(index, 1);
        while let Some((descriptor, depth)) = stack.pop() {
            let document = match self.fetch(&descriptor).await {
                // Somebody's chart or signature beside the images of an index.
                Err(PullError::Manifest { source: ManifestError::NotAnImage(_), .. })
                    if descriptor.platform.is_none() =>
                {
                    continue;
                }
                fetched => fetched?,
            };
            match document {
                Document::Index(_) if depth >= self.limits.index_depth_max => {
                    return Err(PullError::IndexTooDeep { name: self.name.clone() });
                }
                Document::Index(inner) => stack.extend(self.candidates(inner, depth + 1)),
                Document::Manifest(manifest) => {
                    let platform = descriptor.platform.as_ref();
                    let image = self.image(&manifest, descriptor.digest, platform).await?;
                    if image.is_some() {
                        return Ok(image);
                    }
                }
            }
        }
        Ok(None)
    }

    /// The entries that may be what is wanted, best last.
    fn candidates(&mut self, index: ImageIndex, depth: usize) -> Vec<(Descriptor, usize)> {
        let mut ranked = Vec::new();
        for entry in index.manifests {
            if entry.is_attestation() || !(entry.is_manifest() || entry.is_index()) {
                continue;
            }
            let Some(platform) = &entry.platform else {
                ranked.push((u32::MAX, entry));
                continue;
            };
            self.available.push(platform.clone());
            if let Some(rank) = self.wanted.rank(platform) {
                ranked.push((rank, entry));
            }
        }
        // Stable, so that of equals the first listed is popped first.
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().rev().map(|(_, entry)| (entry, depth)).collect()
    }

    /// Fetches and checks the document an index entry names.
    async fn fetch(&mut self, descriptor: &Descriptor) -> Result<Document, PullError> {
        self.documents += 1;
        if self.documents > self.limits.documents_max {
            return Err(PullError::IndexTooDeep { name: self.name.clone() });
        }
        let (bytes, content_type) = self.bytes_of(descriptor).await?;
        if bytes.len() as u64 != descriptor.size_bytes {
            return Err(PullError::SizeMismatch {
                what: format!("manifest {}", descriptor.digest),
                expected_bytes: descriptor.size_bytes,
                actual_bytes: bytes.len() as u64,
            });
        }
        let announced = essence(&descriptor.media_type);
        if let Some(received) = content_type.map(|text| essence(&text))
            && received != announced
        {
            let (announced, document) = (shown(&announced), shown(&received));
            return Err(self.refused(ManifestError::Contradiction { announced, document }));
        }
        self.parse(&bytes, Some(&announced))
    }

    async fn bytes_of(
        &self,
        descriptor: &Descriptor,
    ) -> Result<(Bytes, Option<String>), PullError> {
        let max = self.limits.manifest_bytes_max;
        match self.store {
            Store::Registry(repository) => {
                let fetched = repository.manifest(&descriptor.digest.to_string()).await?;
                Ok((fetched.bytes, fetched.content_type))
            }
            Store::Layout(_) | Store::Archive(_) => {
                Ok((Bytes::from(self.small_blob(descriptor, "manifest", max).await?), None))
            }
        }
    }

    /// A whole blob that must be small.
    async fn small_blob(
        &self,
        descriptor: &Descriptor,
        what: &str,
        bytes_max: u64,
    ) -> Result<Vec<u8>, PullError> {
        let Descriptor { digest, size_bytes, .. } = descriptor;
        if *size_bytes > bytes_max {
            return Err(PullError::TooLarge { what: format!("{what} {digest}"), bytes_max });
        }
        let stream = match self.store {
            Store::Registry(repository) => {
                BlobStream::download(repository.clone(), *digest, *size_bytes, false).await?
            }
            Store::Layout(layout) => layout.blob(*digest, *size_bytes)?,
            Store::Archive(archive) => archive.blob(*digest, *size_bytes)?,
        };
        stream.collect().await
    }

    /// The image of a manifest; none if its config says it is for another platform. What an
    /// index entry claims about the platform is believed before the config.
    async fn image(
        &mut self,
        manifest: &Manifest,
        manifest_digest: Digest,
        claimed: Option<&Platform>,
    ) -> Result<Option<Image>, PullError> {
        let max = self.limits.config_bytes_max;
        let bytes = self.small_blob(&manifest.config, "config", max).await?;
        let digest = manifest.config.digest;
        let config =
            ImageConfig::parse(&bytes).map_err(|source| PullError::Config { digest, source })?;
        let platform = claimed.cloned().or_else(|| config.platform());
        let platform = platform.unwrap_or_else(|| self.wanted.clone());
        if self.wanted.rank(&platform).is_none() {
            self.available.push(platform);
            return Ok(None);
        }
        let layers = self.layers(manifest, &config)?;
        let anonymous = match self.store {
            Store::Registry(repository) => repository.is_anonymous(),
            Store::Layout(_) | Store::Archive(_) => false,
        };
        Ok(Some(Image {
            name: self.name.clone(),
            manifest_digest,
            index_digest: self.index_digest,
            config_digest: digest,
            config,
            platform,
            layers,
            anonymous,
        }))
    }

    fn layers(&self, manifest: &Manifest, config: &ImageConfig) -> Result<Vec<Layer>, PullError> {
        if manifest.layers.len() != config.diff_ids.len() {
            return Err(PullError::LayerCount {
                name: self.name.clone(),
                layers: manifest.layers.len(),
                diff_ids: config.diff_ids.len(),
            });
        }
        let mut total: u64 = 0;
        for layer in &manifest.layers {
            total = total.saturating_add(layer.size_bytes);
            if layer.size_bytes > self.limits.layer_bytes_max {
                let what = format!("layer {}", layer.digest);
                return Err(PullError::TooLarge { what, bytes_max: self.limits.layer_bytes_max });
            }
        }
        if total > self.limits.image_bytes_max {
            let what = format!("the sum of the layers of {}", self.name);
            return Err(PullError::TooLarge { what, bytes_max: self.limits.image_bytes_max });
        }
        Layer::all(manifest, &config.diff_ids).map_err(|source| self.refused(source))
    }
}
