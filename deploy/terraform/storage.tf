locals {
  # Three buckets, because a role is given on a whole bucket: clusters only read raw files, and do not see artifacts.
  buckets = {
    raw       = "${var.bucket_prefix}-raw"
    lake      = "${var.bucket_prefix}-lake"
    artifacts = "${var.bucket_prefix}-artifacts"
  }

  raw_uri       = "s3://${yandex_storage_bucket.this["raw"].bucket}/transactions"
  lake_uri      = "s3://${yandex_storage_bucket.this["lake"].bucket}/lake"
  artifacts_uri = "s3://${yandex_storage_bucket.this["artifacts"].bucket}/mlflow"

  # Data Proc writes the drivers' logs below dataproc/ of the bucket that it is given, which is the lake's.
  expiring_prefixes = { lake = ["lake/_runs/", "dataproc/"] }
}

resource "yandex_kms_symmetric_key" "buckets" {
  folder_id           = var.folder_id
  name                = "${var.name}-buckets"
  description         = "Objects in the buckets; whoever deletes this key deletes them all."
  default_algorithm   = "AES_256"
  rotation_period     = "8760h"
  deletion_protection = var.deletion_protection
}

resource "yandex_storage_bucket" "this" {
  for_each = local.buckets

  folder_id     = var.folder_id
  bucket        = each.value
  force_destroy = false

  anonymous_access_flags {
    read        = false
    list        = false
    config_read = false
  }

  versioning {
    enabled = true
  }

  server_side_encryption_configuration {
    rule {
      apply_server_side_encryption_by_default {
        kms_master_key_id = yandex_kms_symmetric_key.buckets.id
        sse_algorithm     = "aws:kms"
      }
    }
  }

  lifecycle_rule {
    id                                     = "old-versions"
    enabled                                = true
    abort_incomplete_multipart_upload_days = 7

    noncurrent_version_expiration {
      days = var.old_versions_days
    }
  }

  dynamic "lifecycle_rule" {
    for_each = lookup(local.expiring_prefixes, each.key, [])

    content {
      id      = "expire-${replace(trimsuffix(lifecycle_rule.value, "/"), "/", "-")}"
      enabled = true

      filter {
        prefix = lifecycle_rule.value
      }

      expiration {
        days = var.run_files_days
      }
    }
  }
}
