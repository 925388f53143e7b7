//! `keelson kubeconfig`: what kubectl, other nodes and other users need, and the files that a control
//! plane keeps for what runs on its own machine.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::{Context, bail};
use keelson_control_plane::pki::{self, ClusterPki, Leaf, Signer};

use crate::{
    cli::KubeconfigArgs,
    cluster::{ClusterFacts, EXTENSION},
    node,
    paths::Paths,
};

/// The cluster's name in kubeconfigs.
const CLUSTER: &str = "keelson";

/// The files that a control plane keeps, with its own certificates in them.
#[derive(Clone, Debug)]
pub(crate) struct OwnKubeconfigs {
    pub(crate) paths: Paths,
    /// `https://address:port` of the API server.
    pub(crate) url: String,
    pub(crate) facts: ClusterFacts,
    /// The name of the node whose agent runs here as a process of its own, if one may.
    pub(crate) node: Option<String>,
}

impl OwnKubeconfigs {
    /// Writes those that are not as they should be: missing, or with a certificate from before its
    /// renewal.
    ///
    /// # Errors
    /// When one can't be written.
    pub(crate) fn write(&self, pki: &ClusterPki) -> anyhow::Result<()> {
        let write = |path: &Path, leaf: Leaf, user: &str, facts: &ClusterFacts| {
            let extension = facts.extension()?;
            let text = pki.kubeconfig(leaf, &self.url, user, Some((EXTENSION, &extension)));
            if fs::read_to_string(path).is_ok_and(|present| present == text) {
                return Ok(());
            }
            write_private(path, &text)
        };
        write(&self.paths.admin_kubeconfig, Leaf::Admin, "kubernetes-admin", &self.facts)?;
        let Some(name) = &self.node else { return Ok(()) };
        let serving = Some(pki.certificate(Leaf::KubeletServer).into());
        let of_node = ClusterFacts { serving, ..self.facts.clone() };
        let user = format!("system:node:{name}");
        write(&self.paths.kubelet_kubeconfig, Leaf::KubeletClient, &user, &of_node)?;
        write(&self.paths.proxy_kubeconfig, Leaf::KubeProxy, "system:kube-proxy", &self.facts)
    }
}

/// Prints a kubeconfig, or writes it where it is asked for.
///
/// # Errors
/// When there is no cluster here yet, a name can't be used, or the file can't be written.
pub(crate) fn run(args: &KubeconfigArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let path = &paths.admin_kubeconfig;
    let admin = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{} is not there yet: `keelson up{}` makes it", path.display(), paths.flag())
        }
        Err(error) => return Err(error).with_context(|| format!("kubeconfig {}", path.display())),
    };
    let text = if args.node.is_some() || args.user.is_some() {
        issue(args, &paths, &admin)?
    } else if args.server.is_some() || args.expires_in.is_some() {
        bail!("--server and --expires-in are for kubeconfigs that are issued: --node or --user")
    } else {
        admin
    };
    match &args.output {
        Some(output) => write_private(output, &text),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}

/// Makes a kubeconfig with a new certificate in it.
fn issue(args: &KubeconfigArgs, paths: &Paths, admin: &str) -> anyhow::Result<String> {
    let context = || format!("kubeconfig {}", paths.admin_kubeconfig.display());
    let admin = kube::config::Kubeconfig::from_yaml(admin).with_context(context)?;
    let mut facts = ClusterFacts::of(&admin).with_context(context)?.with_context(|| {
        format!("{} says nothing of the cluster: start the control plane anew", context())
    })?;
    let own = admin.clusters.iter().find_map(|named| named.cluster.as_ref()?.server.clone());
    let server = args.server.clone().or(own).context("--server is needed")?;
    if !server.starts_with("https://") {
        bail!("--server {server:?}: it begins with https://");
    }
    let signer = Signer::open(&paths.pki)?.with_context(|| {
        format!(
            "{} has no certificate authority: run this where the control plane runs",
            paths.pki.display()
        )
    })?;
    let (user, group) = match (&args.node, &args.user) {
        (Some(name), _) => {
            let name = node::name(Some(name), "--node")?;
            let serving = signer.kubelet_server(&name, &args.address, args.expires_in)?;
            facts.serving = Some(serving.into());
            (format!("system:node:{name}"), Some("system:nodes"))
        }
        (None, user) => (user.clone().unwrap_or_default(), args.group.as_deref()),
    };
    if user.is_empty() {
        bail!("--user: a name is needed");
    }
    let client = signer.client(&user, group, args.expires_in)?;
    Ok(pki::kubeconfig(&pki::Kubeconfig {
        server_url: &server,
        ca_pem: signer.ca_pem(),
        client: &client,
        cluster: CLUSTER,
        user: &user,
        context: &format!("{user}@{CLUSTER}"),
        extension: Some((EXTENSION, &facts.extension()?)),
    }))
}

/// Writes a file that only its owner may read, in one step.
///
/// # Errors
/// When the folder or the file can't be written.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let context = || format!("write {}", path.display());
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(context)?;
    }
    let mut name = path.file_name().with_context(context)?.to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(context)?;
    file.write_all(text.as_bytes()).with_context(context)?;
    file.sync_all().with_context(context)?;
    fs::rename(&temporary, path).with_context(context)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use clap::Parser;
    use keelson_control_plane::pki::PkiConfig;

    use super::*;
    use crate::cli::{Cli, Command};

    fn control_plane(dir: &Path) -> (OwnKubeconfigs, ClusterPki) {
        let paths = Paths::new(Some(dir)).unwrap();
        let config = PkiConfig {
            node_name: "n1".into(),
            advertise_addresses: vec!["192.0.2.1".parse().unwrap()],
            service_ip: "10.96.0.1".parse().unwrap(),
            cluster_domain: "cluster.local".into(),
            extra_sans: Vec::new(),
        };
        let pki = ClusterPki::load_or_create(&paths.pki, &config).unwrap();
        let facts = ClusterFacts {
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            cluster_dns: "10.96.0.10".parse().unwrap(),
            cluster_domain: "cluster.local".into(),
            serving: None,
        };
        let url = "https://192.0.2.1:6443".to_owned();
        (OwnKubeconfigs { paths, url, facts, node: Some("n1".into()) }, pki)
    }

    fn user_of(path: &Path) -> (String, Option<ClusterFacts>) {
        let read = kube::config::Kubeconfig::read_from(path).unwrap();
        (read.auth_infos[0].name.clone(), ClusterFacts::of(&read).unwrap())
    }

    #[test]
    fn the_parts_of_a_machine_get_kubeconfigs_that_follow_renewals() {
        let dir = tempfile::tempdir().unwrap();
        let (own, pki) = control_plane(dir.path());
        own.write(&pki).unwrap();
        let (user, facts) = user_of(&own.paths.kubelet_kubeconfig);
        assert_eq!(user, "system:node:n1");
        assert!(facts.unwrap().serving.is_some());
        let (user, facts) = user_of(&own.paths.proxy_kubeconfig);
        assert_eq!((user.as_str(), facts), ("system:kube-proxy", Some(own.facts.clone())));

        let admin = own.paths.admin_kubeconfig.clone();
        assert_eq!(fs::metadata(&admin).unwrap().permissions().mode() & 0o777, 0o600);
        let before = fs::read_to_string(&admin).unwrap();
        own.write(&pki).unwrap();
        assert_eq!(fs::read_to_string(&admin).unwrap(), before);
        fs::remove_file(own.paths.pki.join("admin.crt")).unwrap();
        assert_eq!(pki.renew().unwrap(), [Leaf::Admin]);
        own.write(&pki).unwrap();
        assert_ne!(fs::read_to_string(&admin).unwrap(), before, "the renewed certificate");
    }

    #[test]
    fn kubeconfigs_are_issued_for_other_nodes_and_users() {
        let dir = tempfile::tempdir().unwrap();
        let (own, pki) = control_plane(dir.path());
        let output = dir.path().join("out.conf");
        let asked = |arguments: &[&str]| {
            let mut all = vec!["keelson", "kubeconfig"];
            all.extend_from_slice(arguments);
            let (data, output) = (dir.path().to_str().unwrap(), output.to_str().unwrap());
            all.extend(["--data-dir", data, "-o", output]);
            match Cli::try_parse_from(all)?.command {
                Command::Kubeconfig(args) => run(&args),
                _ => unreachable!(),
            }
        };
        let node = ["--node", "n2", "--address", "192.0.2.2"];
        assert!(asked(&node).unwrap_err().to_string().contains("keelson up"));
        own.write(&pki).unwrap();
        asked(&node).unwrap();
        let (user, facts) = user_of(&output);
        assert_eq!(user, "system:node:n2");
        assert!(facts.unwrap().serving.is_some());
        asked(&["--user", "jane", "--group", "developers", "--server", "https://api.example:6443"])
            .unwrap();
        let (user, facts) = user_of(&output);
        assert_eq!((user.as_str(), facts), ("jane", Some(own.facts)));
        for wrong in [
            &["--node", "n2"][..],
            &["--node", "N_2", "--address", "192.0.2.2"],
            &["--address", "192.0.2.2"],
            &["--group", "g"],
            &["--user", "u", "--server", "http://192.0.2.1"],
            &["--server", "https://192.0.2.1"],
        ] {
            assert!(asked(wrong).is_err(), "{wrong:?}");
        }
    }
}
