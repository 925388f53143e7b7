//! Whom a container runs as: names are looked up in the image's own `/etc/passwd` and `/etc/group`.

use crate::runtime::{ContainerSecurity, LinuxUser};

use super::SpecError;

/// The image's account files; empty where it has none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts {
    /// `/etc/passwd`.
    pub(crate) passwd: String,
    /// `/etc/group`.
    pub(crate) group: String,
}

struct PasswdLine<'a> {
    name: &'a str,
    uid: i64,
    gid: i64,
}

struct GroupLine<'a> {
    name: &'a str,
    gid: i64,
    members: Vec<&'a str>,
}

impl Accounts {
    fn users(&self) -> impl Iterator<Item = PasswdLine<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(PasswdLine { name, uid, gid })
        })
    }

    fn groups(&self) -> impl Iterator<Item = GroupLine<'_>> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let gid = fields.nth(1)?.parse().ok()?;
            let members =
                fields.next().unwrap_or_default().split(',').filter(|m| !m.is_empty()).collect();
            Some(GroupLine { name, gid, members })
        })
    }
}

/// The user, group and further groups of a container's process.
///
/// `runAsUser` wins over a user by name, that over the image's `USER` (`user`, `user:group`, each a
/// name or a number). Without a group the user's own from `/etc/passwd` is taken, else 0. The groups
/// that `/etc/group` lists the user in are added, unless the policy is `Strict`.
pub(crate) fn resolve(
    security: &ContainerSecurity,
    image_user: &str,
    accounts: &Accounts,
) -> Result<LinuxUser, SpecError> {
    let (user, group) = match (security.run_as_user, &security.run_as_username) {
        (Some(uid), _) => (uid.to_string(), None),
        (None, Some(name)) if !name.is_empty() => split(name),
        _ => split(image_user),
    };
    let entry = match user.parse::<i64>() {
        Ok(uid) => {
            accounts.users().find(|u| u.uid == uid).unwrap_or(PasswdLine { name: "", uid, gid: 0 })
        }
        Err(_) if user.is_empty() => PasswdLine { name: "root", uid: 0, gid: 0 },
        Err(_) => accounts.users().find(|u| u.name == user).ok_or_else(|| {
            SpecError::Invalid(format!(
                "user {user:?}: the image's /etc/passwd has none of this name"
            ))
        })?,
    };
    let gid = match (security.run_as_group, group.as_deref()) {
        (Some(gid), _) => gid,
        (None, Some(group)) => match group.parse::<i64>() {
            Ok(gid) => gid,
            Err(_) => {
                accounts.groups().find(|g| g.name == group).map(|g| g.gid).ok_or_else(|| {
                    SpecError::Invalid(format!(
                        "group {group:?}: the image's /etc/group has none of this name"
                    ))
                })?
            }
        },
        (None, None) => entry.gid,
    };
    for (what, id) in [("user", entry.uid), ("group", gid)] {
        in_range(what, id)?;
    }
    let mut groups = vec![gid];
    if !security.strict_supplemental_groups && !entry.name.is_empty() {
        groups.extend(accounts.groups().filter(|g| g.members.contains(&entry.name)).map(|g| g.gid));
    }
    for id in &security.supplemental_groups {
        in_range("group", *id)?;
        groups.push(*id);
    }
    let mut seen = std::collections::BTreeSet::new();
    groups.retain(|g| seen.insert(*g));
    Ok(LinuxUser { uid: entry.uid, gid, supplemental_groups: groups })
}

fn split(user: &str) -> (String, Option<String>) {
    match user.split_once(':') {
        Some((user, group)) => (user.to_owned(), Some(group.to_owned()).filter(|g| !g.is_empty())),
        None => (user.to_owned(), None),
    }
}

fn in_range(what: &str, id: i64) -> Result<(), SpecError> {
    // -1 means "unchanged" to the kernel.
    if (0..i64::from(u32::MAX)).contains(&id) {
        Ok(())
    } else {
        Err(SpecError::Invalid(format!("{what} id {id}: must be between 0 and {}", u32::MAX - 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:www:/:/bin/false\nbroken\n".into(),
            group: "root:x:0:\nweb:x:34:\nlogs:x:40:web,root\ntape:x:41:nobody\n".into(),
        }
    }

    fn resolved(security: &ContainerSecurity, image: &str) -> (i64, i64, Vec<i64>) {
        let user = resolve(security, image, &accounts()).unwrap();
        (user.uid, user.gid, user.supplemental_groups)
    }

    #[test]
    fn users_come_from_the_pod_then_the_image() {
        let none = ContainerSecurity::default();
        assert_eq!(resolved(&none, ""), (0, 0, vec![0, 40]));
        assert_eq!(resolved(&none, "web"), (33, 34, vec![34, 40]));
        assert_eq!(resolved(&none, "33"), (33, 34, vec![34, 40]));
        assert_eq!(resolved(&none, "web:tape"), (33, 41, vec![41, 40]));
        assert_eq!(resolved(&none, "1000:2000"), (1000, 2000, vec![2000]));
        assert_eq!(resolved(&none, "1000"), (1000, 0, vec![0]));
        let given = ContainerSecurity {
            run_as_user: Some(33),
            run_as_group: Some(7),
            supplemental_groups: vec![8, 7, 8],
            ..ContainerSecurity::default()
        };
        assert_eq!(resolved(&given, "root"), (33, 7, vec![7, 40, 8]));
        let strict = ContainerSecurity { strict_supplemental_groups: true, ..given };
        assert_eq!(resolved(&strict, "root"), (33, 7, vec![7, 8]));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_named() {
        let none = ContainerSecurity::default();
        for (image, word) in
            [("nobody", "nobody"), ("web:wheel", "wheel"), ("4294967295", "4294967295")]
        {
            let error = resolve(&none, image, &accounts()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let negative = ContainerSecurity { run_as_user: Some(-1), ..none };
        assert!(resolve(&negative, "", &accounts()).is_err());
    }
}
