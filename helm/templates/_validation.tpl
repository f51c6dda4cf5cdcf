{{/* What no schema can say about the values: all that is wrong, told at once and before anything is made. */}}

{{- define "merger.validate" -}}
{{- $wrong := concat (include "merger.wrong.names" . | fromYamlArray) (include "merger.wrong.database" . | fromYamlArray) (include "merger.wrong.api" . | fromYamlArray) (include "merger.wrong.network" . | fromYamlArray) (include "merger.wrong.monitoring" . | fromYamlArray) -}}
{{- if $wrong -}}
{{- fail (printf "\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- include "merger.storage.validate" . -}}
{{- include "merger.ray.validate" . -}}
{{- end -}}

{{/* Each of these prints a list of sentences. */}}
{{- define "merger.wrong.names" -}}
{{- $name := default (ternary .Release.Name (printf "%s-%s" .Release.Name (include "merger.name" .)) (contains (include "merger.name" .) .Release.Name)) .Values.fullnameOverride }}
{{- if gt (len $name) 40 }}
- {{ printf "The name %q has %d characters; 40 leave room for what objects append. Choose a shorter release name or set fullnameOverride." $name (len $name) | quote }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
- {{ printf "The name %q is no name for a Service: small letters, digits and dashes, a letter first. Set fullnameOverride." $name | quote }}
{{- end }}
{{- end -}}

{{- define "merger.wrong.database" -}}
{{- if and .Values.postgresql.enabled .Values.database.existingSecret }}
- "database.existingSecret and postgresql.enabled name two databases: unset one of them."
{{- else if not (or .Values.postgresql.enabled .Values.database.existingSecret) }}
- "There is no database. Make a Secret with its URL (kubectl create secret generic merger-database --from-literal=url=postgresql://...) and set database.existingSecret, or set postgresql.enabled for a trial."
{{- end }}
{{- with .Values.database.existingSecret }}
{{- with lookup "v1" "Secret" $.Release.Namespace . }}
{{- $url := dig "data" $.Values.database.key "" . | b64dec }}
{{- if not $url }}
- {{ printf "The Secret %s has no key %s. Put the database's URL there, or name its key in database.key." $.Values.database.existingSecret $.Values.database.key | quote }}
{{- else if hasPrefix "sqlite" $url }}
- {{ printf "The URL in the Secret %s is one of SQLite, which pods cannot share. Use PostgreSQL." $.Values.database.existingSecret | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "merger.wrong.api" -}}
{{- with .Values.api.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
- {{ printf "api.autoscaling.minReplicas (%d) is above maxReplicas (%d)." (int .minReplicas) (int .maxReplicas) | quote }}
{{- end }}
{{- end }}
{{- if and .Values.api.autoscaling.enabled (not (dig "requests" "cpu" "" .Values.api.resources)) }}
- "api.autoscaling counts in requested processors, and api.resources.requests.cpu is not set."
{{- end }}
{{- with .Values.api.keda }}
{{- if and .enabled $.Values.api.autoscaling.enabled }}
- "api.keda.enabled and api.autoscaling.enabled would scale the same pods: unset one of them."
{{- end }}
{{- if and .enabled (not .triggers) }}
- "api.keda.enabled needs api.keda.triggers: what the number of pods follows."
{{- end }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
- {{ printf "api.keda.minReplicas (%d) is above maxReplicas (%d)." (int .minReplicas) (int .maxReplicas) | quote }}
{{- end }}
{{- if and .enabled (not ($.Capabilities.APIVersions.Has "keda.sh/v1alpha1/ScaledObject")) }}
- "api.keda.enabled needs KEDA (keda.sh/v1alpha1), which this cluster does not have. (`helm template` does with --api-versions keda.sh/v1alpha1/ScaledObject.)"
{{- end }}
{{- end }}
{{- $grace := dig "grace_seconds" 20.0 .Values.settings }}
{{- if lt (float64 .Values.api.terminationGracePeriodSeconds) (addf .Values.api.preStopSeconds $grace) }}
- {{ printf "api.terminationGracePeriodSeconds must have room for preStopSeconds and settings.grace_seconds: %v and more." (addf .Values.api.preStopSeconds $grace) | quote }}
{{- end }}
{{- if lt (float64 .Values.dispatcher.terminationGracePeriodSeconds) (float64 $grace) }}
- {{ printf "dispatcher.terminationGracePeriodSeconds must have room for settings.grace_seconds: %v and more." $grace | quote }}
{{- end }}
{{- end -}}

{{- define "merger.wrong.network" -}}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") }}
- "service.nodePort needs service.type NodePort or LoadBalancer."
{{- end }}
{{- if and (ne .Values.service.type "LoadBalancer") (or .Values.service.loadBalancerClass .Values.service.loadBalancerSourceRanges) }}
- "service.loadBalancerClass and loadBalancerSourceRanges need service.type LoadBalancer."
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
- "ingress.enabled needs ingress.hosts: without one the Ingress would answer for every name."
{{- end }}
{{- if .Values.httpRoute.enabled }}
{{- if not .Values.httpRoute.parentRefs }}
- "httpRoute.enabled needs httpRoute.parentRefs: the Gateway that it belongs to."
{{- end }}
{{- if not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1/HTTPRoute") }}
- "httpRoute.enabled needs the Gateway API's resources (gateway.networking.k8s.io/v1), which this cluster does not have. (`helm template` does with --api-versions gateway.networking.k8s.io/v1/HTTPRoute.)"
{{- end }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (or .Values.ingress.enabled .Values.httpRoute.enabled) (not (or .Values.networkPolicy.ingressNamespaces .Values.networkPolicy.ingressFrom)) }}
- "The network policies would keep the ingress controller or gateway away: name its namespace in networkPolicy.ingressNamespaces."
{{- end }}
{{- end -}}
