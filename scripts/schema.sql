-- policyd's table for a new site: mariadb policyd < schema.sql
--
-- ts                DATETIME(3): one clock for all relays, the database's.
-- the three texts   utf8mb4_bin: logins that differ in a letter or an accent
--                   are different accounts.
-- the index         the sum of a login's last 24 h reads its own rows only.
--
-- The columns keep the names, and the primary key, of go-policyd's table.
-- `policyd --init-db` does the same, and upgrades an old table to this.

CREATE TABLE IF NOT EXISTS `events` (
  `ts` DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3),
  `sasl_username` VARCHAR(255) NOT NULL DEFAULT '',
  `sender` VARCHAR(255) NOT NULL DEFAULT '',
  `client_address` VARCHAR(80) NOT NULL DEFAULT '',
  `recipient_count` INT DEFAULT NULL,
  PRIMARY KEY (`ts`, `sasl_username`, `sender`, `client_address`),
  KEY `login_ts` (`sasl_username`, `ts`, `recipient_count`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;
