//! Which master key a database's secrets are sealed with. Knows the key's name, never the key.

use super::Rows;
use crate::store::StoreError;
use crate::store::engine::sql;

impl Rows {
    pub(crate) async fn master_key(&self) -> Result<Option<String>, StoreError> {
        let query = || sql("SELECT id FROM master_key");
        let row = self.again(|| self.engine.optional(query())).await?;
        row.map(|row| row.text("id")).transpose()
    }

    pub(crate) async fn claim_master_key(&self, id: &str) -> Result<String, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let query = sql("INSERT INTO master_key (id, place) VALUES ($1, 1) \
                 ON CONFLICT DO NOTHING");
            tx.execute(query.text(id)).await?;
            let held = tx.one(sql("SELECT id FROM master_key")).await?.text("id")?;
            tx.commit().await?;
            Ok(held)
        })
        .await
    }

    pub(crate) async fn forget_master_key(&self) -> Result<u64, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            tx.execute(sql("DELETE FROM master_key")).await?;
            let query = "SELECT COUNT(*) AS found FROM build WHERE sealed_credentials IS NOT NULL";
            let sealed = tx.one(sql(query)).await?.count("found")?;
            tx.commit().await?;
            Ok(sealed)
        })
        .await
    }
}
