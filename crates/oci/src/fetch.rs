//! One opened source: registry, layout or archive behind the same three calls.
//!
//! It does not cache, does not decompress and reads no more than it is asked for.

use std::path::Path;
use std::sync::Arc;

use crate::archive::Archive;
use crate::blob::BlobStream;
use crate::client::{Client, Repository};
use crate::error::PullError;
use crate::image::{Image, Layer, is_foreign};
use crate::layout::Layout;
use crate::options::ClientOptions;
use crate::platform::Platform;
use crate::resolve;
use crate::source::Source;

/// One opened source.
#[derive(Debug)]
pub struct Fetcher {
    source: Source,
    options: ClientOptions,
    store: Store,
}

#[derive(Debug)]
pub(crate) enum Store {
    Registry(Arc<Repository>),
    Layout(Arc<Layout>),
    Archive(Arc<Archive>),
}

impl Fetcher {
    /// Opens a source. Nothing is asked of a registry yet. Standard input, unless it is a
    /// file, and gzipped archives are copied to an unlinked temporary file in `spool_dir`.
    ///
    /// # Errors
    /// When options cannot be used, or a file is not what the source says.
    pub async fn open(
        source: &Source,
        options: &ClientOptions,
        spool_dir: &Path,
    ) -> Result<Fetcher, PullError> {
        let client = match source {
            Source::Registry(_) => Some(Client::new(options)?),
            Source::Layout { .. }
            | Source::OciArchive { .. }
            | Source::DockerArchive { .. }
            | Source::Stdin => None,
        };
        Fetcher::open_with(source, options, client.as_ref(), spool_dir).await
    }

    /// Opens a source with a client that is shared between several images of one user.
    ///
    /// # Errors
    /// As [`Fetcher::open`].
    pub async fn open_shared(
        source: &Source,
        client: &Client,
        spool_dir: &Path,
    ) -> Result<Fetcher, PullError> {
        Fetcher::open_with(source, client.options(), Some(client), spool_dir).await
    }

    async fn open_with(
        source: &Source,
        options: &ClientOptions,
        client: Option<&Client>,
        spool_dir: &Path,
    ) -> Result<Fetcher, PullError> {
        let store = match source {
            Source::Registry(reference) => {
                let made = match client {
                    Some(client) => client.clone(),
                    None => Client::new(options)?,
                };
                Store::Registry(Arc::new(Repository::new(&made, reference)?))
            }
            Source::Layout { dir, .. } => Store::Layout(Arc::new(Layout::open(dir)?)),
            Source::OciArchive { .. } | Source::DockerArchive { .. } | Source::Stdin => {
                let archive = Archive::open(source, options.limits, spool_dir).await?;
                Store::Archive(Arc::new(archive))
            }
        };
        Ok(Fetcher { source: source.clone(), options: options.clone(), store })
    }

    /// Finds the image for a platform: manifest and config are fetched and checked.
    ///
    /// # Errors
    /// When there is no such image, or what there is cannot be trusted or used.
    pub async fn resolve(&self, platform: &Platform) -> Result<Image, PullError> {
        let limits = &self.options.limits;
        let resolved = resolve::resolve(&self.store, &self.source, limits, platform).await;
        match &self.store {
            // Documents may repeat what was sent as well.
            Store::Registry(repository) => {
                let secrets = repository.client.transport().secrets();
                resolved.map_err(|error| error.with_quotes(&|text| secrets.blotted(text)))
            }
            Store::Layout(_) | Store::Archive(_) => resolved,
        }
    }

    /// Whether everything so far was had without credentials; see [`Image::anonymous`].
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        match &self.store {
            Store::Registry(repository) => repository.is_anonymous(),
            Store::Layout(_) | Store::Archive(_) => false,
        }
    }

    /// What went wrong without being fatal since this was last asked: mirrors that were passed
    /// over, each with its reason, for a person to read. Ask after [`Fetcher::resolve`], well
    /// or not, and when the layers have been read.
    #[must_use]
    pub fn take_notes(&self) -> Vec<String> {
        match &self.store {
            Store::Registry(repository) => repository.take_notes(),
            Store::Layout(_) | Store::Archive(_) => Vec::new(),
        }
    }

    /// Starts reading a layer of an image that this fetcher resolved. Waits while as many
    /// blobs as [`ClientOptions::connections_per_host`] are being read from the registry: read
    /// every stream to its end or drop it.
    ///
    /// # Errors
    /// When the blob cannot be had.
    pub async fn blob(&self, _image: &Image, layer: &Layer) -> Result<BlobStream, PullError> {
        match &self.store {
            Store::Registry(repository) => {
                let foreign = is_foreign(&layer.media_type);
                let repository = Arc::clone(repository);
                BlobStream::download(repository, layer.digest, layer.size_bytes, foreign).await
            }
            Store::Layout(layout) => layout.blob(layer.digest, layer.size_bytes),
            Store::Archive(archive) => archive.blob(layer.digest, layer.size_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn futures_may_move_between_threads() {
        fn is_send<T: Send>(_: &T) {}
        fn check(fetcher: &Fetcher, image: &Image, layer: &Layer, platform: &Platform) {
            is_send(&fetcher.resolve(platform));
            is_send(&fetcher.blob(image, layer));
        }
        fn check_stream(stream: &mut BlobStream) {
            is_send(&stream.next());
        }
        fn is_shared<T: Send + Sync>() {}
        is_shared::<Fetcher>();
        let _ = (check as fn(_, _, _, _), check_stream as fn(_));
        is_send(&Fetcher::open(&Source::Stdin, &ClientOptions::default(), Path::new("/tmp")));
    }
}
