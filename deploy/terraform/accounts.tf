# README.md has the table of these roles, with the calls that need them.

# Calls the API of Data Proc, and holds the key of S3.
resource "yandex_iam_service_account" "dagster" {
  folder_id   = var.folder_id
  name        = "${var.name}-dagster"
  description = "Dagster and MLflow: makes clusters, reads and writes the buckets."
}

# What the jobs run as; it has no key.
resource "yandex_iam_service_account" "cluster" {
  folder_id   = var.folder_id
  name        = "${var.name}-cluster"
  description = "Hosts of the Data Proc clusters: reads raw files, reads and writes the lake."
}

resource "yandex_iam_service_account" "autoscaling" {
  count = var.create_autoscaling_account ? 1 : 0

  folder_id   = var.folder_id
  name        = "${var.name}-autoscaling"
  description = "Resizes the Data Proc clusters."
}

locals {
  dagster     = "serviceAccount:${yandex_iam_service_account.dagster.id}"
  cluster     = "serviceAccount:${yandex_iam_service_account.cluster.id}"
  autoscaling = [for account in yandex_iam_service_account.autoscaling : "serviceAccount:${account.id}"]
}

resource "yandex_resourcemanager_folder_iam_member" "dagster" {
  for_each = toset(["dataproc.editor", "vpc.user"])

  folder_id = var.folder_id
  role      = each.value
  member    = local.dagster
}

resource "yandex_resourcemanager_folder_iam_member" "cluster" {
  # An account for autoscaling provisions the hosts where there is one.
  for_each = toset(var.create_autoscaling_account ? ["dataproc.agent"] : ["dataproc.agent", "dataproc.provisioner"])

  folder_id = var.folder_id
  role      = each.value
  member    = local.cluster
}

resource "yandex_resourcemanager_folder_iam_member" "autoscaling" {
  count = length(local.autoscaling)

  folder_id = var.folder_id
  role      = "dataproc.provisioner"
  member    = local.autoscaling[count.index]
}

# On the accounts that a cluster is made with, not on the folder: Dagster cannot act as any other account.
resource "yandex_iam_service_account_iam_member" "dagster_uses_cluster" {
  service_account_id = yandex_iam_service_account.cluster.id
  role               = "iam.serviceAccounts.user"
  member             = local.dagster
}

resource "yandex_iam_service_account_iam_member" "dagster_uses_autoscaling" {
  count = length(yandex_iam_service_account.autoscaling)

  service_account_id = yandex_iam_service_account.autoscaling[count.index].id
  role               = "iam.serviceAccounts.user"
  member             = local.dagster
}

resource "yandex_storage_bucket_iam_binding" "raw_readers" {
  bucket  = yandex_storage_bucket.this["raw"].bucket
  role    = "storage.viewer"
  members = [local.dagster, local.cluster]
}

resource "yandex_storage_bucket_iam_binding" "raw_uploaders" {
  count = length(var.raw_uploaders) > 0 ? 1 : 0

  bucket  = yandex_storage_bucket.this["raw"].bucket
  role    = "storage.uploader"
  members = var.raw_uploaders
}

# storage.uploader would not do: jobs replace files, and a replaced partition is deleted first.
resource "yandex_storage_bucket_iam_binding" "lake_editors" {
  bucket  = yandex_storage_bucket.this["lake"].bucket
  role    = "storage.editor"
  members = [local.dagster, local.cluster]
}

resource "yandex_storage_bucket_iam_binding" "artifacts_editors" {
  bucket  = yandex_storage_bucket.this["artifacts"].bucket
  role    = "storage.editor"
  members = [local.dagster]
}

resource "yandex_kms_symmetric_key_iam_binding" "buckets" {
  symmetric_key_id = yandex_kms_symmetric_key.buckets.id
  role             = "kms.keys.encrypterDecrypter"
  members          = concat([local.dagster, local.cluster], var.raw_uploaders)
}

# boto3 and MLflow take no tokens of the cloud, only a static key. Its secret half is in the state.
resource "yandex_iam_service_account_static_access_key" "dagster" {
  service_account_id = yandex_iam_service_account.dagster.id
  description        = "S3 for Dagster and MLflow."
}
