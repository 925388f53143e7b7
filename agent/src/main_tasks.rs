//! The tasks that the agent can't do without: one that ends by itself ends the agent.

use std::{collections::HashMap, future::Future, time::Duration};

use tokio::task::{Id, JoinError, JoinSet};

/// Tasks with names.
#[derive(Debug, Default)]
pub(crate) struct MainTasks {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

/// How one of them ended.
#[derive(Debug)]
pub(crate) struct TaskEnd {
    /// Its name.
    pub(crate) name: &'static str,
    /// An error when it panicked.
    pub(crate) result: Result<(), JoinError>,
}

impl MainTasks {
    /// Starts a task.
    pub(crate) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits for the next task to end; for ever when there is none.
    pub(crate) async fn next_end(&mut self) -> TaskEnd {
        let Some(ended) = self.tasks.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let (id, result) = match ended {
            Ok((id, ())) => (id, Ok(())),
            Err(error) => (error.id(), Err(error)),
        };
        TaskEnd { name: self.names.remove(&id).unwrap_or("task"), result }
    }

    /// Waits until all have ended, so long at most. Whether they have.
    pub(crate) async fn rest(mut self, limit: Duration) -> bool {
        let rest = async { while self.tasks.join_next().await.is_some() {} };
        tokio::time::timeout(limit, rest).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_has_a_name_and_a_panic_is_seen() {
        let mut tasks = MainTasks::default();
        tasks.spawn("quiet", std::future::pending());
        tasks.spawn("loud", async { panic!("oh no") });
        let end = tasks.next_end().await;
        assert_eq!(end.name, "loud");
        assert!(end.result.unwrap_err().is_panic());
    }
}
