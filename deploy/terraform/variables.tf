variable "folder_id" {
  description = "Folder that everything is made in; best one of its own, because a cluster's hosts may act in all of it."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]{20}$", var.folder_id))
    error_message = "The ID of a folder has 20 lower-case letters and digits: see `yc resource-manager folder list`."
  }
}

variable "zone" {
  description = "Availability zone of the clusters and the virtual machine."
  type        = string
  default     = "ru-central1-a"

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]-[a-z]$", var.zone))
    error_message = "A zone looks like ru-central1-a."
  }
}

variable "name" {
  description = "Beginning of all names, and the name of the deployment (ML_PLATFORM_DEPLOYMENT_NAME)."
  type        = string
  default     = "ml-platform"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,38}[a-z0-9]$", var.name))
    error_message = "A name has 3 to 40 lower-case letters, digits and hyphens, and begins with a letter."
  }
}

variable "bucket_prefix" {
  description = "Beginning of the names of the three buckets, which are shared by all customers of the cloud."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,48}[a-z0-9]$", var.bucket_prefix))
    error_message = "The beginning of a bucket's name has 3 to 50 lower-case letters, digits and hyphens."
  }
}

variable "raw_uploaders" {
  description = "Accounts that deliver raw files: serviceAccount:ID, userAccount:ID, federatedUser:ID or group:ID."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for who in var.raw_uploaders : can(regex("^(serviceAccount|userAccount|federatedUser|group):[a-z0-9]+$", who))])
    error_message = "A member is serviceAccount:ID, userAccount:ID, federatedUser:ID or group:ID; the public is none."
  }
}

variable "run_files_days" {
  description = "Days after which requests, reports and driver logs of a run (LAKE/_runs) and Data Proc's own logs are deleted."
  type        = number
  default     = 90

  validation {
    condition     = var.run_files_days >= 7
    error_message = "Keep the files of a run for 7 days at least: a run that is tried again reads them."
  }
}

variable "old_versions_days" {
  description = "Days for which a replaced or deleted object can be brought back."
  type        = number
  default     = 30

  validation {
    condition     = var.old_versions_days >= 1
    error_message = "Keep replaced objects for 1 day at least."
  }
}

variable "deletion_protection" {
  description = "Keep the key that the buckets are encrypted with, and the disk of a deleted virtual machine."
  type        = bool
  default     = true
}

variable "network_cidr" {
  description = "Private addresses of the network; the clusters get the first half, the virtual machine the second."
  type        = string
  default     = "10.130.0.0/23"

  validation {
    condition     = can(regex("^(10|172[.](1[6-9]|2[0-9]|3[01])|192[.]168)[.].*/(1[6-9]|2[0-6])$", cidrsubnet(var.network_cidr, 1, 1)))
    error_message = "The network takes private IPv4 addresses and a prefix length from 15 to 25, e.g. 10.130.0.0/23."
  }
}

variable "create_autoscaling_account" {
  description = "Make a service account that resizes clusters (DATAPROC_COMPUTE_MAX_COUNT)."
  type        = bool
  default     = false
}

variable "create_log_group" {
  description = "Make a Cloud Logging group for the logs of the clusters' hosts."
  type        = bool
  default     = false
}

variable "create_vm" {
  description = "Make a virtual machine for Dagster, MLflow and PostgreSQL."
  type        = bool
  default     = false
}

variable "vm_ssh_public_key" {
  description = "Public key that opens the virtual machine for the user ubuntu, e.g. ssh-ed25519 AAAA..."
  type        = string
  default     = ""

  validation {
    condition     = var.vm_ssh_public_key == "" || can(regex("^(ssh-|ecdsa-|sk-)[^\n]+$", var.vm_ssh_public_key))
    error_message = "One line of a public key file is expected, such as the content of ~/.ssh/id_ed25519.pub."
  }
}

variable "vm_ssh_cidr_blocks" {
  description = "Addresses that SSH is open to. None: it is closed."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for block in var.vm_ssh_cidr_blocks : can(cidrhost(block, 0)) && try(tonumber(split("/", block)[1]) >= 8, false)])
    error_message = "CIDR blocks are expected, none of them larger than a /8: SSH is not opened to the world."
  }
}

variable "vm_public_ip" {
  description = "Give the virtual machine a public address. Without one it is reached from within the network, and goes out through the NAT gateway."
  type        = bool
  default     = false
}

variable "vm_cores" {
  description = "Cores of the virtual machine."
  type        = number
  default     = 4

  validation {
    condition     = contains([2, 4, 6, 8, 10, 12, 14, 16], var.vm_cores)
    error_message = "The platform standard-v3 takes an even number of cores; 2 to 16 are enough here."
  }
}

variable "vm_memory_gb" {
  description = "Memory of the virtual machine, in GB."
  type        = number
  default     = 16

  validation {
    condition     = var.vm_memory_gb >= 12
    error_message = "The containers of deploy/ need 12 GB at least."
  }
}

variable "vm_disk_gb" {
  description = "Disk of the virtual machine, in GB: system, container images, databases."
  type        = number
  default     = 60

  validation {
    condition     = var.vm_disk_gb >= 30
    error_message = "System and container images need 30 GB at least."
  }
}
