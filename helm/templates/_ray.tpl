{{/*
The Ray cluster: what the service must know of it, and what its pods share. Knows KubeRay's objects; knows nothing of jobs.
*/}}

{{/* The RayCluster's name. */}}
{{- define "merger.ray.name" -}}
{{- printf "%s-ray" (include "merger.fullname" .) -}}
{{- end -}}

{{/* Where Ray's Jobs API is. */}}
{{- define "merger.ray.url" -}}
{{- default (printf "http://%s-head-svc:8265" (include "merger.ray.name" .)) .Values.ray.external.url -}}
{{- end -}}

{{/* The Secret whose key `auth_token` is Ray's token; nothing where Ray runs without. */}}
{{- define "merger.ray.tokenSecret" -}}
{{- if .Values.ray.auth.enabled -}}
{{- default (printf "%s-token" (include "merger.ray.name" .)) .Values.ray.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Labels that select every pod of the cluster: KubeRay's own. */}}
{{- define "merger.ray.podLabels" -}}
ray.io/cluster: {{ include "merger.ray.name" . }}
{{- end -}}

{{/* NetworkPolicy: egress rules to Ray's Jobs API. An external cluster's host may be anything, so its port is open. */}}
{{- define "merger.ray.egress" -}}
{{- if .Values.ray.external.url -}}
- ports:
    - port: {{ include "merger.ray.externalPort" . }}
      protocol: TCP
{{- else -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "merger.ray.podLabels" . | nindent 10 }}
          ray.io/node-type: head
  ports:
    - port: 8265
      protocol: TCP
{{- end -}}
{{- end -}}

{{- define "merger.ray.externalPort" -}}
{{- $host := (urlParse .Values.ray.external.url).host -}}
{{- $port := regexFind ":[0-9]+$" $host | trimPrefix ":" -}}
{{- default (ternary "443" "80" (hasPrefix "https:" .Values.ray.external.url)) $port -}}
{{- end -}}

{{/* The groups that are on, each with the defaults below its own values, as YAML. */}}
{{- define "merger.ray.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.ray.groups -}}
{{- if kindIs "map" $group -}}
{{- $whole := mergeOverwrite (deepCopy $.Values.ray.groupDefaults) (deepCopy $group) -}}
{{- if $whole.enabled -}}{{- $_ := set $groups $name $whole -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{/* A quantity of memory in bytes. */}}
{{- define "merger.ray.bytes" -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $unit := trimPrefix $number . -}}
{{- if not (and $number (hasKey $units $unit)) -}}
{{- fail (printf "%q is no quantity of memory: write one such as 16Gi" .) -}}
{{- end -}}
{{- printf "%.0f" (mulf (float64 $number) (get $units $unit)) -}}
{{- end -}}

{{/* Whole processors of a quantity: Ray rounds up by itself, and 3500m would run four tasks. */}}
{{- define "merger.ray.cores" -}}
{{- $text := toString . -}}
{{- $cores := ternary (divf (float64 (trimSuffix "m" $text)) 1000.0) (float64 (trimSuffix "m" $text)) (hasSuffix "m" $text) -}}
{{- max 1 (int (floor $cores)) -}}
{{- end -}}

{{/*
What a group's nodes offer to Ray, as JSON: (dict "root" $ "name" "cpu" "group" $group). Some memory is not handed out:
the store, Ray's own processes and a runner need it, and Ray counts none of them.
*/}}
{{- define "merger.ray.shape" -}}
{{- $resources := default dict .group.resources -}}
{{- $limits := default dict $resources.limits -}}
{{- $cpu := dig "cpu" (dig "requests" "cpu" "" $resources) $limits -}}
{{- if not (and $cpu (hasKey $limits "memory")) -}}
{{- fail (printf "ray.groups.%s.resources: give a cpu request or limit and a memory limit: Ray hands out by them" .name) -}}
{{- end -}}
{{- $gpus := 0 -}}
{{- range $key, $count := $limits -}}
{{- if hasSuffix "/gpu" $key -}}{{- $gpus = add $gpus (int (toString $count)) -}}{{- end -}}
{{- end -}}
{{- $memory := include "merger.ray.bytes" (toString $limits.memory) -}}
{{- $reserved := include "merger.ray.bytes" (toString .root.Values.ray.reservedMemory) -}}
{{- $left := sub (int64 $memory) (int64 $reserved) -}}
{{- if lt $left 1073741824 -}}
{{- fail (printf "ray.groups.%s.resources: a memory limit of %v leaves less than 1Gi for tasks beside ray.reservedMemory, %s" .name $limits.memory .root.Values.ray.reservedMemory) -}}
{{- end -}}
{{- printf "{\"cpus\":%s,\"gpus\":%d,\"memory\":%d}" (include "merger.ray.cores" $cpu) (int $gpus) $left -}}
{{- end -}}

{{/* JSON of the nodes that the autoscaler may add; nothing without an autoscaler. */}}
{{- define "merger.ray.nodeShapes" -}}
{{- if and .Values.ray.autoscaling.enabled (not .Values.ray.external.url) -}}
{{- $shapes := list -}}
{{- range $name, $group := include "merger.ray.groups" . | fromYaml -}}
{{- if gt (int $group.maxReplicas) 0 -}}
{{- $shape := include "merger.ray.shape" (dict "root" $ "name" $name "group" $group) | trimSuffix "}" -}}
{{- $shapes = append $shapes (printf "%s,\"count\":%d}" $shape (int $group.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- printf "[%s]" (join "," $shapes) -}}
{{- end -}}
{{- end -}}

{{/*
The image of a group: (dict "root" $ "name" "gpu" "group" $group). Its own keys go over the common ones; a CUDA group without
a tag of its own takes the common tag with `-cuda`.
*/}}
{{- define "merger.ray.image" -}}
{{- $own := default dict .group.image -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) $own -}}
{{- if and .group.cuda (not $own.tag) (not $own.digest) -}}
{{- if .root.Values.image.digest -}}
{{- fail (printf "image.digest names one image: give that of the CUDA image in ray.groups.%s.image.digest" .name) -}}
{{- end -}}
{{- $_ := set $image "tag" (printf "%s-cuda" (default .root.Chart.AppVersion .root.Values.image.tag)) -}}
{{- else if and (or $own.tag $own.repository) (not $own.digest) -}}
{{- $_ := set $image "digest" "" -}}
{{- end -}}
{{- include "merger.image" (dict "root" .root "image" $image) -}}
{{- end -}}

{{/* Variables of every Ray container. The operator adds the token's where there is one. */}}
{{- define "merger.ray.env" -}}
- name: HOME
  value: /home/merger
# Not TMPDIR: the operator shares logs at /tmp/ray, and names of sockets must be short.
- name: RAY_TMPDIR
  value: /tmp
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if not .Values.ray.auth.enabled }}
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
{{ include "merger.storage.processEnv" . }}
{{- end -}}

{{- define "merger.ray.rayStartParams" -}}
object-store-memory: {{ include "merger.ray.bytes" .Values.ray.objectStoreMemory | quote }}
{{- end -}}

{{/* A pod's volumes: (dict "root" $ "node" the head's or a group's values). */}}
{{- define "merger.ray.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .root.Values.ray.tmpSize }}
- name: home
  emptyDir:
    sizeLimit: {{ .root.Values.ray.homeSize }}
{{ include "merger.storage.rayVolumes" (dict "root" .root "scratch" .node.scratch) }}
{{- with .node.extraVolumes }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{- define "merger.ray.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/merger
{{ include "merger.storage.mounts" .root | trim }}
{{- with .node.extraVolumeMounts }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{/*
What is the same in every Ray pod's container: (dict "root" $ "name" group "node" values). KubeRay adds the command, probes,
/dev/shm, the metrics port and the token.
*/}}
{{- define "merger.ray.container" -}}
image: {{ include "merger.ray.image" (dict "root" .root "name" .name "group" .node) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "merger.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .node.resources | nindent 2 }}
env:
  {{- include "merger.ray.env" .root | nindent 2 }}
  {{- with concat .root.Values.ray.extraEnv (default list .node.extraEnv) }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- $from := include "merger.storage.envFrom" .root | trim }}
{{- if or $from .root.Values.ray.extraEnvFrom }}
envFrom:
  {{- with $from }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .root.Values.ray.extraEnvFrom }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- end }}
volumeMounts:
  {{- include "merger.ray.mounts" . | nindent 2 }}
{{- end -}}

{{/* A Ray pod's labels and annotations. No version in them: the operator would replace pods for a new label. */}}
{{- define "merger.ray.podMetadata" -}}
labels:
  {{- include "merger.selectorLabels" (dict "root" .root "component" "ray") | nindent 2 }}
  {{- with mergeOverwrite (deepCopy .root.Values.commonLabels) (default dict .node.podLabels) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with mergeOverwrite (deepCopy (default dict .annotations)) (deepCopy (default dict .node.podAnnotations)) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where a Ray pod goes and as whom it runs. No restartPolicy: the autoscaler's second version demands the operator's own. */}}
{{- define "merger.ray.podSettings" -}}
enableServiceLinks: false
securityContext:
  {{- include "merger.podSecurity" . | nindent 2 }}
terminationGracePeriodSeconds: {{ .node.terminationGracePeriodSeconds }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .node.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .node.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .node.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .node.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .node.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- with .node.extraInitContainers }}
initContainers:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A worker's affinity: what the values say, else apart from other workers, so that each has its node's disk and network. */}}
{{- define "merger.ray.affinity" -}}
{{- if .group.affinity -}}
affinity:
  {{- tpl (toYaml .group.affinity) .root | nindent 2 }}
{{- else if ne .group.spread "none" -}}
affinity:
  podAntiAffinity:
    {{- if eq .group.spread "required" }}
    requiredDuringSchedulingIgnoredDuringExecution:
      - {{- include "merger.ray.apart" .root | nindent 8 }}
    {{- else }}
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          {{- include "merger.ray.apart" .root | nindent 10 }}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "merger.ray.apart" -}}
topologyKey: kubernetes.io/hostname
labelSelector:
  matchLabels:
    {{- include "merger.ray.podLabels" . | nindent 4 }}
    ray.io/node-type: worker
{{- end -}}

{{/* Refuses what cannot work, with what to do. */}}
{{- define "merger.ray.validate" -}}
{{- $ray := .Values.ray -}}
{{- if $ray.external.url -}}
{{- if and $ray.auth.enabled (not $ray.auth.existingSecret) -}}
{{- fail "ray.external.url: name the Secret with the cluster's token (key auth_token) in ray.auth.existingSecret, or set ray.auth.enabled=false where it has none" -}}
{{- end -}}
{{- else -}}
{{- if not (or $ray.skipCRDCheck (.Capabilities.APIVersions.Has "ray.io/v1/RayCluster")) -}}
{{- fail "the cluster does not know RayClusters: install the KubeRay operator, 1.7 or newer, first. `helm template` cannot see: give it --api-versions ray.io/v1/RayCluster, or set ray.skipCRDCheck=true" -}}
{{- end -}}
{{- $groups := include "merger.ray.groups" . | fromYaml -}}
{{- if not $groups -}}
{{- fail "ray.groups: there is no group of workers; jobs would wait for ever. Keep one, or name a cluster in ray.external.url" -}}
{{- end -}}
{{- $most := 0 -}}
{{- range $name, $group := $groups -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "ray.groups: %q is no name of a group: small letters, digits and dashes, at most 40" $name) -}}
{{- end -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- fail (printf "ray.groups.%s: minReplicas is above maxReplicas" $name) -}}
{{- end -}}
{{- $most = add $most (int (ternary $group.maxReplicas $group.minReplicas $.Values.ray.autoscaling.enabled)) -}}
{{- $_ := include "merger.ray.shape" (dict "root" $ "name" $name "group" $group) -}}
{{- end -}}
{{- if eq (int $most) 0 -}}
{{- fail "ray.groups: no group may have a worker; raise minReplicas, or maxReplicas and ray.autoscaling.enabled" -}}
{{- end -}}
{{- if ge (int64 (include "merger.ray.bytes" $ray.objectStoreMemory)) (int64 (include "merger.ray.bytes" $ray.reservedMemory)) -}}
{{- fail "ray.reservedMemory must be larger than ray.objectStoreMemory, which is part of it" -}}
{{- end -}}
{{- include "merger.ray.validateTolerance" . -}}
{{- end -}}
{{- end -}}

{{- define "merger.ray.validateTolerance" -}}
{{- $tolerance := .Values.ray.gcsFaultTolerance -}}
{{- if and (eq $tolerance.backend "redis") (not $tolerance.redis.address) -}}
{{- fail "ray.gcsFaultTolerance.backend is redis: give its address in ray.gcsFaultTolerance.redis.address, such as redis:6379" -}}
{{- end -}}
{{- end -}}

{{/* The account of the workers: for roles that open object stores; it may nothing in Kubernetes. Not the cluster's own name, which is the operator's. */}}
{{- define "merger.ray.serviceAccount" -}}
{{- default (printf "%s-worker" (include "merger.ray.name" .)) .Values.ray.serviceAccount.name -}}
{{- end -}}
