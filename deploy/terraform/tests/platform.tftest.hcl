# `terraform init && terraform test`: needs the provider (Terraform 1.7 or later), but no cloud.

mock_provider "yandex" {}

variables {
  folder_id     = "b1gabcdefghij0123456"
  bucket_prefix = "example-fraud"
}

run "least" {
  assert {
    condition = alltrue([for line in [
      "ML_PLATFORM_DEPLOYMENT=yandex",
      "ML_PLATFORM_RAW_URI=s3://example-fraud-raw/transactions",
      "ML_PLATFORM_LAKE_URI=s3://example-fraud-lake/lake",
      "MLFLOW_ARTIFACTS_DESTINATION=s3://example-fraud-artifacts/mlflow",
      "DATAPROC_BUCKET=example-fraud-lake",
      "YC_SUBNET_ID=${yandex_vpc_subnet.cluster.id}",
      "YC_SERVICE_ACCOUNT_ID=${yandex_iam_service_account.cluster.id}",
    ] : contains(split("\n", output.environment), line)])
    error_message = output.environment
  }

  assert {
    condition     = !strcontains(output.environment, "null") && !strcontains(output.environment, "DATAPROC_LOG_GROUP_ID")
    error_message = "What was not made has no line."
  }

  assert {
    condition     = !strcontains(output.environment, yandex_iam_service_account_static_access_key.dagster.secret_key)
    error_message = "The secret key is not in the output environment."
  }

  assert {
    condition     = [for rule in yandex_storage_bucket.this["lake"].lifecycle_rule : rule.filter[0].prefix if length(rule.filter) > 0] == ["lake/_runs/", "dataproc/"]
    error_message = "Files of runs and Data Proc's logs expire."
  }

  assert {
    condition     = length(yandex_storage_bucket.this["raw"].lifecycle_rule) == 1
    error_message = "Raw files do not expire."
  }

  assert {
    condition     = output.vm_address == null && !strcontains(output.environment, "CODE_CPUS")
    error_message = "A virtual machine is made on request only."
  }

  assert {
    condition     = keys(yandex_resourcemanager_folder_iam_member.cluster) == ["dataproc.agent", "dataproc.provisioner"]
    error_message = "The clusters' account provisions their hosts."
  }

  assert {
    condition     = join(", ", sort([for rule in yandex_vpc_security_group.cluster.egress : "${rule.protocol} ${rule.port}" if coalesce(rule.port, -1) > 0])) == "TCP 443, UDP 123"
    error_message = "Hosts reach HTTPS and NTP, without which Data Proc makes no cluster."
  }
}

run "everything" {
  variables {
    create_autoscaling_account = true
    create_log_group           = true
    create_vm                  = true
    vm_cores                   = 2
    vm_ssh_public_key          = "ssh-ed25519 AAAA user@host"
    vm_ssh_cidr_blocks         = ["10.0.0.0/8", "192.0.2.1/32"]
    vm_public_ip               = true
    raw_uploaders              = ["serviceAccount:abc", "userAccount:def"]
  }

  assert {
    condition     = strcontains(output.environment, "DATAPROC_LOG_GROUP_ID=${yandex_logging_group.cluster[0].id}\n")
    error_message = output.environment
  }

  assert {
    condition     = strcontains(output.environment, "CODE_CPUS=2\n")
    error_message = "The container has no more processors than the virtual machine."
  }

  assert {
    condition     = keys(yandex_resourcemanager_folder_iam_member.cluster) == ["dataproc.agent"]
    error_message = "The account for autoscaling provisions the hosts."
  }

  assert {
    condition     = one(yandex_vpc_security_group.vm[0].ingress).port == 22
    error_message = "SSH alone is open."
  }

  assert {
    condition     = yandex_vpc_subnet.cluster.v4_cidr_blocks[0] == "10.130.0.0/24" && yandex_vpc_subnet.vm[0].v4_cidr_blocks[0] == "10.130.1.0/24"
    error_message = "Clusters and virtual machine share the network by halves."
  }

  assert {
    condition     = yandex_compute_instance.vm[0].boot_disk[0].auto_delete == false
    error_message = "The databases outlive the virtual machine."
  }

  assert {
    condition     = length(yandex_kms_symmetric_key_iam_binding.buckets.members) == 4
    error_message = "An account that uploads must be able to encrypt."
  }
}

run "virtual_machine_needs_a_key" {
  command = plan

  variables {
    create_vm = true
  }

  expect_failures = [yandex_compute_instance.vm]
}

run "ssh_is_not_opened_to_the_world" {
  command = plan

  variables {
    vm_ssh_cidr_blocks = ["0.0.0.0/0"]
  }

  expect_failures = [var.vm_ssh_cidr_blocks]
}

run "nor_by_halves_nor_by_ipv6" {
  command = plan

  variables {
    vm_ssh_cidr_blocks = ["0.0.0.0/1", "128.0.0.0/1", "::/0"]
  }

  expect_failures = [var.vm_ssh_cidr_blocks]
}

run "the_public_delivers_no_raw_files" {
  command = plan

  variables {
    raw_uploaders = ["system:allUsers"]
  }

  expect_failures = [var.raw_uploaders]
}

run "public_addresses_are_no_network" {
  command = plan

  variables {
    network_cidr = "8.8.0.0/23"
  }

  expect_failures = [var.network_cidr]
}

run "unusable_values" {
  command = plan

  variables {
    folder_id         = "my-folder"
    bucket_prefix     = "Example_Fraud"
    zone              = "a"
    name              = "1"
    network_cidr      = "10.0.0.0/28"
    run_files_days    = 1
    old_versions_days = 0
    vm_cores          = 3
    vm_memory_gb      = 1
    vm_disk_gb        = 1
    vm_ssh_public_key = "-----BEGIN OPENSSH"
  }

  expect_failures = [
    var.folder_id,
    var.bucket_prefix,
    var.zone,
    var.name,
    var.network_cidr,
    var.run_files_days,
    var.old_versions_days,
    var.vm_cores,
    var.vm_memory_gb,
    var.vm_disk_gb,
    var.vm_ssh_public_key,
  ]
}
