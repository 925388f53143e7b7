//! `keelson image`: the images of this machine.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::Context;
use keelson_runtime_shim::{
    images::{FileInImage, ImageOptions, ImageStore},
    runtime::Image,
};

use crate::{
    cli::{DataArgs, ImageCommand, RegistryArgs},
    demo,
    paths::Paths,
};

/// Where the store of images is, below the runtime's folder.
pub(crate) fn store_path(paths: &Paths) -> PathBuf {
    paths.runtime.join("images")
}

/// The store's options as the command line has them.
pub(crate) fn options(registries: &RegistryArgs) -> ImageOptions {
    ImageOptions {
        default_registry: registries.default_registry.clone(),
        insecure_registries: registries.insecure_registry.clone(),
        ..ImageOptions::default()
    }
}

fn open(data: &DataArgs, options: ImageOptions) -> anyhow::Result<(Paths, ImageStore)> {
    let paths = Paths::new(data.data_dir.as_deref()).context("data folder")?;
    let store = ImageStore::open(store_path(&paths), options)?;
    Ok((paths, store))
}

/// Runs the command.
///
/// # Errors
/// What the store or the registry says.
pub(crate) async fn run(command: ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Import { data, path, name } => {
            let (_, store) = open(&data, ImageOptions::default())?;
            let images =
                store.import(&path).await.with_context(|| format!("import {}", path.display()))?;
            for image in images {
                let image = match &name {
                    Some(name) => store.tag(image.id.as_str(), name).await?,
                    None => image,
                };
                println!("imported {}", described(&image));
            }
        }
        ImageCommand::Demo { data } => {
            let (_, store) = open(&data, ImageOptions::default())?;
            let image = make_demo_image(&store).await?;
            println!("made {}", described(&image));
        }
        ImageCommand::Pull { data, registries, image } => {
            let (_, store) = open(&data, options(&registries))?;
            eprintln!("pulling {image} …");
            let image = store.pull(&image, &[]).await?;
            println!("pulled {}", described(&image));
        }
        ImageCommand::Ls { data } => {
            let (_, store) = open(&data, ImageOptions::default())?;
            print!("{}", table(&store.list().await?));
        }
        ImageCommand::Rm { data, images } => {
            let (paths, store) = open(&data, ImageOptions::default())?;
            let in_use = keelson_runtime_shim::embedded::images_in_use(&paths.runtime)
                .with_context(|| format!("containers in {}", paths.runtime.display()))?;
            for image in images {
                store.remove(&image, &in_use).await?;
                println!("removed {image}");
            }
        }
    }
    Ok(())
}

/// The image of the examples: this very binary with the shared libraries that it has loaded.
///
/// # Errors
/// When a file can't be read or the store not written.
pub(crate) async fn make_demo_image(store: &ImageStore) -> anyhow::Result<Image> {
    let binary = std::env::current_exe().context("this program's file")?;
    let mut files = vec![FileInImage { path: "/bin/keelson".into(), source: binary, mode: 0o755 }];
    for library in loaded_libraries()? {
        files.push(FileInImage { path: library.clone(), source: library, mode: 0o755 });
    }
    let config = oci_config()?;
    store.build_from_files(demo::IMAGE, &files, &config).await.context("make the examples' image")
}

fn oci_config() -> anyhow::Result<oci_spec::image::Config> {
    oci_spec::image::ConfigBuilder::default()
        .entrypoint(vec!["/bin/keelson".to_owned(), "demo-web".to_owned()])
        .exposed_ports(vec!["8080/tcp".to_owned()])
        .working_dir("/".to_owned())
        .build()
        .context("the examples' image")
}

/// The shared libraries, and the loader, that this process has mapped, by the paths that the loader
/// looked for them at.
fn loaded_libraries() -> anyhow::Result<BTreeSet<PathBuf>> {
    let maps = std::fs::read_to_string("/proc/self/maps").context("/proc/self/maps")?;
    let mut libraries: BTreeSet<PathBuf> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .filter(|path| path.contains(".so"))
        .map(PathBuf::from)
        .collect();
    // The kernel looks for the loader at the path in the program's header, which is often a link.
    for loader in ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"] {
        if Path::new(loader).exists() {
            libraries.insert(loader.into());
        }
    }
    // The loader asks for a library by its short name; maps have the name of the file behind it.
    let links: Vec<PathBuf> = libraries.iter().flat_map(|library| short_names(library)).collect();
    libraries.extend(links);
    Ok(libraries)
}

/// The links beside a library that lead to it (`libz.so.1` to `libz.so.1.2.13`).
fn short_names(library: &Path) -> Vec<PathBuf> {
    let Some(folder) = library.parent() else { return Vec::new() };
    let stem = library
        .file_name()
        .map(|name| name.to_string_lossy())
        .and_then(|name| name.find(".so").map(|at| name[..at + 3].to_owned()));
    let Some(stem) = stem else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&stem))
        .map(|entry| entry.path())
        .filter(|path| path.is_symlink())
        .filter(|path| {
            path.canonicalize().is_ok_and(|target| Some(target) == library.canonicalize().ok())
        })
        .collect()
}

fn described(image: &Image) -> String {
    let name = image.repo_tags.first().or(image.repo_digests.first());
    format!("{} ({})", name.map_or("an image without a name", String::as_str), image.id)
}

fn table(images: &[Image]) -> String {
    let mut rows = vec![["IMAGE".to_owned(), "IMAGE ID".to_owned(), "SIZE".to_owned()]];
    for image in images {
        let id =
            image.id.as_str().trim_start_matches("sha256:").chars().take(12).collect::<String>();
        let size = human_size(image.size);
        if image.repo_tags.is_empty() {
            let name = image.repo_digests.first().map_or("<none>", String::as_str);
            rows.push([name.to_owned(), id.clone(), size.clone()]);
        }
        for tag in &image.repo_tags {
            rows.push([tag.clone(), id.clone(), size.clone()]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    rows.iter().map(|[name, id, size]| format!("{name:first$}  {id:second$}  {size}\n")).collect()
}

fn human_size(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["B", "kB", "MB"] {
        if size < 1000.0 {
            return format!("{size:.1} {unit}");
        }
        size /= 1000.0;
    }
    format!("{size:.1} GB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_own_libraries_are_found() {
        let libraries = loaded_libraries().unwrap();
        assert!(libraries.iter().any(|path| path.ends_with("libc.so.6")), "{libraries:?}");
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(human_size(999), "999.0 B");
        assert_eq!(human_size(12_345_678), "12.3 MB");
    }
}
