locals {
  environment = {
    ML_PLATFORM_DEPLOYMENT                  = "yandex"
    ML_PLATFORM_DEPLOYMENT_NAME             = var.name
    ML_PLATFORM_RAW_URI                     = local.raw_uri
    ML_PLATFORM_LAKE_URI                    = local.lake_uri
    MLFLOW_ARTIFACTS_DESTINATION            = local.artifacts_uri
    AWS_ENDPOINT_URL_S3                     = "https://storage.yandexcloud.net"
    AWS_DEFAULT_REGION                      = "ru-central1"
    YC_FOLDER_ID                            = var.folder_id
    YC_ZONE                                 = var.zone
    YC_SUBNET_ID                            = yandex_vpc_subnet.cluster.id
    YC_SECURITY_GROUP_IDS                   = yandex_vpc_security_group.cluster.id
    YC_SERVICE_ACCOUNT_ID                   = yandex_iam_service_account.cluster.id
    DATAPROC_BUCKET                         = yandex_storage_bucket.this["lake"].bucket
    DATAPROC_AUTOSCALING_SERVICE_ACCOUNT_ID = one(yandex_iam_service_account.autoscaling[*].id)
    DATAPROC_LOG_GROUP_ID                   = one(yandex_logging_group.cluster[*].id)
    # A container may not have more processors than its host.
    CODE_CPUS = var.create_vm ? min(var.vm_cores, 4) : null
  }

  secrets = {
    AWS_ACCESS_KEY_ID     = yandex_iam_service_account_static_access_key.dagster.access_key
    AWS_SECRET_ACCESS_KEY = yandex_iam_service_account_static_access_key.dagster.secret_key
  }
}

output "environment" {
  description = "Lines of the environment file; no secrets."
  value       = join("", [for name, value in local.environment : "${name}=${value}\n" if value != null])
}

output "secrets" {
  description = "Lines of the environment file with the key of S3."
  value       = join("", [for name, value in local.secrets : "${name}=${value}\n"])
  sensitive   = true
}

output "dagster_service_account_id" {
  description = "Account that Dagster calls the API as; outside the virtual machine it needs an authorized key."
  value       = yandex_iam_service_account.dagster.id
}

output "vm_address" {
  description = "Address of the virtual machine: the public one if it has one."
  value       = one([for vm in yandex_compute_instance.vm : coalesce(vm.network_interface[0].nat_ip_address, vm.network_interface[0].ip_address)])
}
